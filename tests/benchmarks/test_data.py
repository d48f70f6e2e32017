"""benchmarks/data: it makes what it says, and times all parts."""

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks" / "data"

# Other benchmarks have a run.py too.
found = importlib.util.spec_from_file_location("data_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(found)
found.loader.exec_module(run)


def test_each_kind_is_made_listed_and_read(tmp_path, capsys):
    output = tmp_path / "data.json"
    small = ["--images", "70", "--per-shard", "20", "--size", "32", "--batch-size", "4", "--batches", "3"]
    run.main([*small, "--workers", "0", "--folder", str(tmp_path), "--output", str(output)])
    written = json.loads(output.read_text())
    assert [one["kind"] for one in written["results"]] == ["shards", "folder", "list"]
    for one in written["results"]:
        assert one["images"] == 70
        assert one["images_per_second"] > 0
        assert one["first_batch_seconds"] > 0
    assert list(tmp_path.iterdir()) == [output], "the images are gone"
    assert "listing_seconds" in capsys.readouterr().out


def test_shards_are_as_many_as_images_need_and_their_pictures_differ(tmp_path):
    pattern = run.make("shards", tmp_path, count=45, per_shard=20, side=16)
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    source = run.open_images(pattern)
    assert len(source) == 45
    assert source.read(0).tobytes() != source.read(1).tobytes()
