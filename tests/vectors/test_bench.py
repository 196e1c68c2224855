"""The benchmark of files of word vectors."""

import importlib.util

import pytest

from gpu_embed.bench import cli, word_vectors
from gpu_embed.bench.word_vectors import GENSIM, OURS

COMMAND = ["--device", "cpu", "word-vectors", "--words", "50", "--dim", "3", "--rounds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    made = tmp_path_factory.mktemp("files")
    word_vectors.write_files(made, 50, 3)
    return made


def test_both_readers_read_the_same(folder):
    for name, readers in word_vectors.ways(folder).items():
        ours = readers[OURS]()
        assert len(ours) == (5 if "fastText" in name else 50)
        if GENSIM in readers:
            theirs = readers[GENSIM]()
            assert ours.words == theirs.index_to_key
            assert ours.matrix == pytest.approx(theirs.vectors, abs=1e-6)


def test_a_reading_is_a_process_of_its_own(folder):
    seconds, mebibytes = word_vectors._start(folder, "GloVe text", OURS)
    assert 0 < seconds < 60
    # Of a large pool of Arrow's at the most.
    assert 0 <= mebibytes < 500
    with pytest.raises(word_vectors.ReadError, match="gpu_embed failed to read nothing: KeyError"):
        word_vectors._start(folder, "nothing", OURS)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys):
    taken = {OURS: iter(range(100, 1000)), GENSIM: iter(range(500, 5000, 5))}
    monkeypatch.setattr(
        word_vectors, "_start", lambda folder, name, reader: (next(taken[reader]), 7.0)
    )
    assert cli.main(COMMAND) == 0
    said = capsys.readouterr().out
    assert "Files of 50 x 3 vectors, median of 2 readings" in said
    # The first turn is not counted.
    assert (
        "│ GloVe text             │  101.50 │ 507.50 │ 5.00 (5.00 to 5.00) │         7 │      7 │"
        in said
    )
    assert said.count("│") == 7 * 6


def test_what_is_missing_or_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys):
    def fails(*arguments: object) -> None:
        raise word_vectors.ReadError("gensim failed to read it")

    monkeypatch.setattr(word_vectors, "_start", fails)
    assert cli.main(COMMAND) == 2
    assert "gensim failed to read it" in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gensim" else find_spec(name)
    )
    assert cli.main(COMMAND) == 2
    assert 'install the extra "vectors"' in capsys.readouterr().err
