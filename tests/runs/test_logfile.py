from runs import logfile


def test_log_is_read_by_byte_offset(tmp_path):
    path = tmp_path / "train.log"
    assert (logfile.size(path), logfile.read_at(path, 0, 10), logfile.tail_offset(path, 10)) == (0, b"", 0)
    path.write_bytes(b"one\ntwo\nthree\n")
    assert logfile.read_at(path, 4, 4) == b"two\n"
    assert logfile.read_at(path, 100, 4) == b""
    assert logfile.tail_offset(path, 8) == 8  # within "two": moved on to the next line
    assert logfile.tail_offset(path, 100) == 0
