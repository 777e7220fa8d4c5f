"""JSON that people read: any text comes back as it was, from one line of UTF-8."""

import json

from basinescape.runs.jsonl_journal import Journal, read_lines
from basinescape.runs.jsontext import json_bytes
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs, too


@given(st.dictionaries(TEXT, TEXT | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(TEXT)))
def test_any_value_is_read_back_from_one_line(value):
    data = json_bytes(value)
    assert json.loads(data) == value and len(data.decode("utf-8").splitlines()) == 1


def test_letters_stay_and_what_json_lacks_is_null():
    assert json_bytes({"prompt": "Bär 熊", "gap": [float("nan"), 1.5]}) == '{"prompt": "Bär 熊", "gap": [null, 1.5]}'.encode()


def test_a_journal_of_any_letters_is_repaired_to_what_it_was(tmp_path):
    path, lines = tmp_path / "manifest.jsonl", [{"id": text} for text in ("Bär", "熊\u2028", "\udcff", "a")]
    with Journal(path, lambda line: line["id"]) as journal:
        journal.append(*lines)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-2])):  # a line ends anywhere, within a letter too
        path.write_bytes(whole[: -cut - len(b'{"id": "a"}\n')])
        with Journal(path, lambda line: line["id"]) as journal:
            journal.append(*(line for line in lines if line["id"] not in journal))
        assert path.read_bytes() == whole and list(read_lines(path)) == lines
