"""Plug-ins of a run folder: never executed unasked, never changed without a word, and resumed exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.registry import BACKBONES, SAMPLERS, load_plugins
from stbench.core.rng import seeded_globals
from stbench.evaluate.past_run import open_run
from stbench.evaluate.points import protocol_of
from stbench.evaluate.run_plugins import PluginChoice
from stbench.runs.folder import RunFolder
from stbench.testing import check_backbone
from stbench.train import engine
from tests.conftest import Command, share_statistics, tiny_spec
from tests.fake_runs import edit_record
from tests.train.test_engine import StopAt

pytestmark = pytest.mark.slow

NOISY = """
import torch
from pathlib import Path
from stbench.backbones.sit import SiT
from stbench.core.registry import BACKBONES

with Path({marker!r}).open("a") as file:
    file.write("executed\\n")


@BACKBONES.register_module(name="noisy")
class Noisy(SiT):
    '''A SiT that adds noise to its input while it is trained.'''

    def forward_intermediates(self, x, t, y, **options):
        noise = 0.1 * torch.randn_like(x) if self.training else 0.0
        return super().forward_intermediates(x + noise, t, y, **options)
"""


def forget_plugins() -> None:
    """Unregister the plug-in and forget its module, as in a new process."""
    for name in [name for name in sys.modules if name.startswith("stbench_plugin_")]:
        del sys.modules[name]
    BACKBONES.module_dict.pop("noisy", None)
    SAMPLERS.module_dict.pop("own", None)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture()
def plugin(tmp_path: Path) -> Path:
    """A plug-in file with a backbone; executing it adds a line to the file `marker`."""
    file = tmp_path / "noisy.py"
    file.write_text(NOISY.format(marker=str(tmp_path / "marker")))
    return file


def executions(plugin: Path) -> int:
    marker = plugin.with_name("marker")
    return len(marker.read_text().splitlines()) if marker.exists() else 0


def train(plugin: Path, output: str = "runs", *, backbone: str = "noisy", stop: int = 0) -> Path:
    """Train a run with the plug-in, in a process that forgets it afterwards; returns the run folder."""
    forget_plugins()
    plugins = load_plugins([plugin])
    prepared = prepare(tiny_spec(backbone=backbone, steps=3, train__save_every=10))
    options = engine.RunOptions(share_statistics(plugin.parent / output), plugins=plugins)
    hooks = [StopAt(stop)] if stop else []
    try:
        record, _ = engine.run(prepared, options, hooks)
    finally:
        forget_plugins()
    return Path(record.path)


@pytest.fixture()
def run(plugin: Path) -> Path:
    """A finished run that uses the plug-in."""
    return train(plugin)


def commands(run: Path) -> list[list[str]]:
    """The commands that open a run folder."""
    out = run.parent.parent
    return [
        ["sample", str(run), "-n", "2", "--steps", "2", "--output", str(out / "images.npz")],
        ["evaluate", str(run), "--set", "eval.steps=3", "--device", "cpu"],
        ["export", str(run), "--output", str(out / "weights.pt")],
    ]


def test_a_plug_in_that_only_the_run_names_is_not_executed(run: Path, plugin: Path, stbench: Command) -> None:
    before = executions(plugin)
    for command in commands(run):
        code, _, err = stbench(*command)
        assert code == 2 and err.count("\n") == 1
        assert "backbone 'noisy', which is not registered" in err and f"--plugin {plugin}" in err
    assert executions(plugin) == before


def test_a_forged_record_does_not_execute_a_file(trained_run: Path, tmp_path: Path) -> None:
    import shutil

    run, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(trained_run, run)
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(marker)!r}, 'w')")
    edit_record(run / "spec.json", plugins={str(evil): hash_file(evil), "os:system": "0" * 64})
    open_run(run)  # the run uses built-in parts only
    assert not marker.exists()


def test_a_named_plug_in_is_used(run: Path, plugin: Path, stbench: Command) -> None:
    sample, evaluate, export = commands(run)
    code, _, err = stbench(*sample, "--plugin", plugin)
    assert code == 0, err
    forget_plugins()
    code, out, err = stbench(*evaluate, "--plugin", plugin)
    assert code == 0 and "1 rows added" in out, err
    forget_plugins()
    code, _, err = stbench(*export, "--plugin", plugin)
    assert code in (0, 2) and "Traceback" not in err


def test_a_changed_plug_in_is_refused_before_it_is_executed(
    run: Path, plugin: Path, stbench: Command
) -> None:
    recorded = hash_file(plugin)
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    before = executions(plugin)
    for command in commands(run):
        code, _, err = stbench(*command, "--plugin", plugin)
        assert code == 2 and recorded in err and hash_file(plugin) in err and "--allow-changed-plugin" in err
    assert executions(plugin) == before


def test_a_changed_plug_in_of_another_name_is_refused(run: Path, plugin: Path) -> None:
    other = plugin.with_name("renamed.py")
    other.write_text(plugin.read_text() + "\n# changed\n")
    with pytest.raises(
        UserError, match=f"expected sha256 .*{hash_file(plugin)[:16]}, found .*noisy|backbone"
    ):
        open_run(run, PluginChoice((other,)))


def test_an_unchanged_plug_in_may_move(run: Path, plugin: Path) -> None:
    moved = plugin.with_name("renamed.py")
    plugin.rename(moved)
    assert not open_run(run, PluginChoice((moved,))).changed


def test_rows_of_a_changed_plug_in_carry_its_hash(run: Path, plugin: Path, stbench: Command) -> None:
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    before = RunFolder(run).record()
    for expected in ("1 rows added", "0 rows added"):
        forget_plugins()
        code, out, err = stbench(
            "evaluate", run, "--device", "cpu", "--plugin", plugin, "--allow-changed-plugin"
        )
        assert code == 0 and expected in out, err
    after = RunFolder(run).record()
    (digest,) = after.protocols.keys() - before.protocols.keys()
    assert after.protocols[digest]["plugins"]["backbone"] == hash_file(plugin)[:16]
    assert after.curve[-1].protocol == digest and after.curve[:-1] == before.curve


def test_an_unused_plug_in_is_not_needed(plugin: Path) -> None:
    run = train(plugin, backbone="sit")
    assert str(plugin) in RunFolder(run).spec()["plugins"]
    plugin.unlink()
    open_run(run)


def test_a_sampler_of_a_plug_in_is_part_of_the_protocol(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from stbench.core.registry import SAMPLERS\nfrom stbench.diffusion.flow_samplers import Euler\n"
        "@SAMPLERS.register_module(name='own')\nclass Own(Euler):\n    pass\n"
    )
    load_plugins([file])
    prepared = prepare(tiny_spec(steps=1))
    built_in = protocol_of(prepared.dataset, prepared.spec.eval)
    own = protocol_of(prepared.dataset, prepared.spec.eval.model_copy(update={"sampler": "own"}))
    assert "plugins" not in built_in.fields()
    assert own.fields()["plugins"] == {"sampler": hash_file(file)[:16]}


# --- Plug-ins that draw from torch's global generators ---


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("checkpoints/0-*/raw-00000003.safetensors")
    return load_file(file)


def test_a_backbone_that_draws_resumes_to_the_same_bits(plugin: Path) -> None:
    torch.manual_seed(1)
    straight = final_weights(train(plugin, "straight"))
    torch.manual_seed(2)  # another state of the global generator must not matter
    with pytest.raises(engine.Interrupted):
        train(plugin, "stopped", stop=2)
    torch.manual_seed(3)
    resumed = final_weights(train(plugin, "stopped"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    quiet = final_weights(train(plugin, "quiet", backbone="sit"))
    assert not all(torch.equal(straight[key], quiet[key]) for key in straight), (
        "the noise must have an effect"
    )


def test_check_backbone_says_that_the_network_draws(plugin: Path) -> None:
    load_plugins([plugin])
    with pytest.raises(AssertionError, match="draws random numbers.*seeded at every step"):
        check_backbone("noisy")


def test_global_generators_are_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded_globals(0, "global", 64):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded_globals(0, "global", 64):
        assert torch.equal(torch.rand(2), first)
    with seeded_globals(0, "global", 128):
        assert not torch.equal(torch.rand(2), first)
