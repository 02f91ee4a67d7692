"""The golden runner: our numbers equal the published ones, and a changed number fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stbench.core.errors import UserError
from stbench.models.layers import frequencies, timestep_sinusoid
from stbench.testing.__main__ import main
from stbench.testing.golden.run import Golden, run

FOLDER = Path(__file__).parents[1] / "golden"


def check(folder: Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    return run(folder, lines.append), lines


def copy(target: Path, *names: str) -> None:
    for name in names:
        for file in FOLDER.glob(f"{name}.*"):
            shutil.copy(file, target)


def change(file: Path, key: str, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[key] = by(tensors[key]).contiguous()
    save_file(tensors, file)


def failures(lines: list[str]) -> list[str]:
    return [line for line in lines if "  FAIL" in line]


def test_every_golden_file_is_checked_and_passes() -> None:
    code, lines = check(FOLDER)
    assert failures(lines) == []
    assert code == 0
    assert lines[-1].endswith("0 failed, 0 files not checked")


@pytest.mark.parametrize(
    "names,file,key",
    [
        (("backbone_dit",), "backbone_dit", "sd/blocks.1.mlp.fc1.weight"),
        (("backbone_sit_repa",), "backbone_sit_repa", "sd/projectors.0.2.bias"),
        (("backbone_uvit_a",), "backbone_uvit_a", "sd/out_blocks.1.skip_linear.weight"),
        (("loss_sit_upstream", "backbone_sit_upstream"), "loss_sit_upstream", "out/loss"),
        (("sampler_sit_upstream", "backbone_sit_upstream"), "sampler_sit_upstream", "sde/noise"),
        (("schedules",), "schedules", "iddpm/betas"),
        (("loss_reg",), "loss_reg", "in/noise_cls"),
        (("sampler_reg", "loss_reg"), "sampler_reg", "em_nocfg/noise_cls"),
        (("forward_tread", "backbone_sit_pertoken"), "forward_tread", "in/x0"),
        (("backbone_sit_pertoken",), "backbone_sit_pertoken", "tok/t_groups"),
        (("loss_dts", "backbone_sit_pertoken"), "loss_dts", "in/teacher_u"),
        (("loss_dts_as", "backbone_sit_pertoken"), "loss_dts_as", "same/align_l1_mean"),
        (("loss_haste", "backbone_sit_pertoken"), "loss_haste", "out/attn"),
        (
            ("sampler_internal_guidance", "loss_internal_guidance"),
            "sampler_internal_guidance",
            "em_cfg_ig/noise",
        ),
        (("loss_internal_guidance",), "loss_internal_guidance", "head/final_layer_xr.linear.bias"),
        (("loss_internal_guidance",), "loss_internal_guidance", "grad/tokens"),
        (("loss_vae_align", "backbone_sit_repa"), "loss_vae_align", "out/head_mean_masked_per_sample"),
        (("sampler_delta_fm", "backbone_sit_pertoken"), "sampler_delta_fm", "in/interference"),
        (("forward_tread", "backbone_sit_pertoken"), "forward_tread", "guided/out_intended"),
        (("loss_delta_fm", "backbone_sit_pertoken"), "loss_delta_fm", "skip/out/contrast"),
        (("loss_irepa", "backbone_sit_pertoken"), "loss_irepa", "mid/z_norm"),
        (("loss_sara", "backbone_sit_pertoken"), "loss_sara", "out/struc"),
    ],
)
def test_a_changed_weight_loss_or_noise_fails(
    tmp_path: Path, names: tuple[str, ...], file: str, key: str
) -> None:
    copy(tmp_path, *names)
    assert check(tmp_path)[0] == 0
    change(tmp_path / f"{file}.safetensors", key, lambda value: value + 0.01)
    code, lines = check(tmp_path)
    assert code == 1
    assert all(line.startswith(file) for line in failures(lines)) and failures(lines)


def test_nan_fails(tmp_path: Path) -> None:
    copy(tmp_path, "embeddings")
    change(tmp_path / "embeddings.safetensors", "time/dit_256", lambda value: value * float("nan"))
    assert check(tmp_path)[0] == 1


def test_different_initialisation_statistics_fail(tmp_path: Path) -> None:
    copy(tmp_path, "init_statistics")
    file = tmp_path / "init_statistics.json"
    meta = json.loads(file.read_text())
    meta["dit"]["y_embedder.embedding_table.weight"]["std"] *= 1.2
    meta["sit_upstream"]["pos_embed"]["trainable"] = True
    meta["uvit"]["norm.weight"]["one"] = False
    file.write_text(json.dumps(meta))
    code, lines = check(tmp_path)
    assert code == 1
    assert len(failures(lines)) == 3


def test_missing_tensors_and_corrupt_files_are_named(tmp_path: Path) -> None:
    copy(tmp_path, "embeddings", "backbone_dit")
    tensors = load_file(tmp_path / "embeddings.safetensors")
    del tensors["time/dit_256"]
    save_file(tensors, tmp_path / "embeddings.safetensors")
    corrupt = tmp_path / "backbone_dit.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:1000])
    code, lines = check(tmp_path)
    assert code == 1
    assert [line.split()[0] for line in failures(lines)] == ["backbone_dit", "embeddings"]
    assert "time/dit_256" in failures(lines)[1]


def test_missing_weights_fail(tmp_path: Path) -> None:
    copy(tmp_path, "loss_sit_upstream")
    code, lines = check(tmp_path)
    assert code == 1
    assert "backbone_sit_upstream" in failures(lines)[0]


def test_files_without_a_checker_are_listed(tmp_path: Path) -> None:
    copy(tmp_path, "embeddings")
    (tmp_path / "mystery.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    code, lines = check(tmp_path)
    assert code == 0
    assert "no check for: notes.txt, mystery" in lines
    assert lines[-1].endswith("2 files not checked")


def test_shapes_must_agree() -> None:
    golden = Golden(FOLDER, "embeddings")
    assert not golden.compare("x", torch.zeros(2, 1), torch.zeros(2), 1.0).ok


def test_the_command_reports_by_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", str(tmp_path)]) == 2
    assert "no golden files" in capsys.readouterr().err
    with pytest.raises(UserError, match="no golden files"):
        run(tmp_path / "none")
    copy(tmp_path, "embeddings")
    assert main(["golden", str(tmp_path)]) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dit_256", "uvit_72"])
def test_time_embeddings_equal_the_published_bits(name: str) -> None:
    """Stricter than the golden tolerance: one unit in the last place of a frequency is 3e-5 at t=999."""
    golden = load_file(FOLDER / "embeddings.safetensors")
    actual = timestep_sinusoid(golden["time/t"], int(name.rsplit("_", 1)[1]))
    assert torch.allclose(actual, golden[f"time/{name}"], rtol=0, atol=1e-7)


def test_a_time_embedding_of_odd_width_ends_in_a_zero() -> None:
    t = torch.tensor([0.0, 7.0, 999.0])
    assert torch.equal(timestep_sinusoid(t, 75)[:, :74], timestep_sinusoid(t, 74))
    assert timestep_sinusoid(t, 75)[:, 74].tolist() == [0.0] * 3


@pytest.mark.parametrize("half", [24, 36, 128, 576])
def test_frequencies_are_within_a_unit_in_the_last_place(half: int) -> None:
    exponent = (-9.210340371976184 * torch.arange(half) / half).double()
    exact = exponent.exp()
    assert ((frequencies(half).double() - exact).abs() / exact).max() < 0.56 * 2**-23
