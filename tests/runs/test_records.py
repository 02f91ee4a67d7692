"""Properties of a run record."""

from __future__ import annotations

from pathlib import Path

from tests.fake_runs import make_entry, make_record, write_run


def test_a_fake_record_equals_the_one_read_from_its_run_folder(tmp_path: Path) -> None:
    for teacher in (0, 800):
        arguments = ("taught", teacher, [16.0, 4.0, 1.0])
        options = {"teacher": teacher, "guided": {1.5: 0.5}, "options": {"mask": "released"}}
        written = write_run(tmp_path, *arguments, **options)
        assert written == make_record(*arguments, root=tmp_path, **options)  # type: ignore[arg-type]


def test_final_points_are_those_of_the_last_stage() -> None:
    record = make_record("taught", 0, [16.0, 4.0, 1.0], teacher=400)
    assert [point.stage for point in record.curve] == ["teacher", "student", "student", "student"]
    assert [point.metrics["fid"] for point in record.final_points] == [16.0, 4.0, 1.0]


def test_the_row_key_ignores_the_seed_and_nothing_else() -> None:
    key = make_record("taught", 0, [1.0]).row_key
    assert make_record("taught", 1, [1.0]).row_key == key
    others = [
        make_record("vanilla", 0, [1.0]),
        make_record("taught", 0, [1.0], options={"mask": "released"}),
        make_record("taught", 0, [1.0], steps=(100,)),
        make_record("taught", 0, [1.0], changes={"setting_hash": "other"}),
        make_record("taught", 0, [1.0], changes={"objective": "iddpm"}),
    ]
    assert key not in {record.row_key for record in others}


def test_the_row_key_of_a_journal_entry_is_that_of_its_run() -> None:
    record = make_record("taught", 0, [1.0], changes={"row_hash": "row-taught"})
    assert make_entry("taught").row_key == record.row_key


def test_the_label_names_the_options_in_alphabetical_order() -> None:
    assert make_record("taught", 0, [1.0], options={"b": 1, "a": "x"}).label == "taught (a=x, b=1)"
