import os

import pytest

from vqgnn.files import atomic_write


def test_writes_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with atomic_write(path) as handle:
        handle.write(b"one")
        assert not path.exists()  # nobody sees half a file
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(str(path)) as handle:
        handle.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]
    with atomic_write(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"
