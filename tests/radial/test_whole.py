"""Files of the library are whole or not there."""

import pytest

from radial.whole import written


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "mask.png"
    with written(file) as fresh:
        fresh.write_bytes(b"old")
        assert fresh.suffix == ".png" and not file.exists()
    with pytest.raises(OSError, match="full"), written(file) as fresh:
        fresh.write_bytes(b"ne")
        raise OSError("full")
    assert file.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["mask.png"]
