"""Prompt files by layout: what is read, and what only looks like the layout that its name tells."""

import json

import pytest

from dinalrm_align.data.prompts import read_prompts

CAT, DOG = "a cat", 'a dog, "Rex"'


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", f"{CAT}\n\n  {DOG}\r\n"),
        ("p.txt", f"{CAT}\r{DOG}"),
        ("p", f"\ufeff{CAT}\n{DOG}"),
        ("p.json", json.dumps([CAT, DOG])),
        ("p.JSON", json.dumps([{"prompt": CAT, "id": 1}, {"Prompt": DOG}])),
        ("p.json", json.dumps({"prompts": [CAT, {"prompt": DOG}], "source": "x"})),
        ("p.jsonl", f'\ufeff{{"prompt": "{CAT}"}}\r\n\n{json.dumps(DOG)}\n'),
        ("p.jsonl", "\n".join(json.dumps({"tag": "color", "prompt": one}) for one in (CAT, DOG))),
        ("p.csv", f'prompt\n{CAT}\n"a dog, ""Rex"""\n'),
        ("p.csv", f'\ufeffid, Prompt ,seed\r\n1,{CAT},2\r\n\r\n2,"a dog, ""Rex""",3\r\n'),
        ("p.tsv", f"Prompt\tCategory\n{CAT}\tanimals\n{DOG}\tanimals\n"),
        ("p.tsv", 'prompt\tid\n"a cat"\t1\n"a dog, ""Rex"""\t2\n'),
        ("p.csv", f'Prompts,Category\n{CAT},x\n"a dog, ""Rex""",y\n'),
    ],
)
def test_every_layout_gives_the_prompts(tmp_path, name, content):
    assert read_prompts(written(tmp_path, name, content)) == [CAT, DOG]


def test_quoted_newlines_and_duplicates_are_kept(tmp_path):
    assert read_prompts(written(tmp_path, "p.csv", 'prompt\n"two\nlines"\na\na\n')) == ["two\nlines", "a", "a"]


def test_quotes_of_a_tsv_may_be_text(tmp_path):
    content = 'Prompt\tNote\n"G I G" painted\t\nthe word "OOPS"\t"x"\n'  # as PartiPrompts.tsv
    assert read_prompts(written(tmp_path, "p.tsv", content)) == ['"G I G" painted', 'the word "OOPS"']


def test_a_text_prompt_may_look_like_code(tmp_path):
    lines = [
        "[1girl], solo",
        "{{masterpiece}}",
        "[2024] a cat",
        "{a cat|a dog}",
        '"a cat"',
        "prompt, highly detailed, 8k (best)",
        "3",
    ]
    assert read_prompts(written(tmp_path, "p.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", '[{"prompt": "a cat"}]', "got JSON; expected one prompt per line"),
        ("p.txt", json.dumps({"prompts": ["a"]}, indent=1), "got JSON"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}', "got JSON"),
        ("p.prompts", '\n["a", "b"]\n', "got JSON"),
        ("p.txt", "id,prompt\n1,a cat\n", "got the header 'id,prompt'"),
        ("p.txt", "Prompt\tCategory\na\tb\n", "got the header"),
        ("p.txt", "prompt\na cat\n", "got the header 'prompt'"),
        ("p.txt", ",prompt\n0,a cat\n", "got the header ',prompt'"),  # as pandas writes a table
        ("p.txt", '"prompt","seed"\n"a cat",1\n', "got the header"),
        ("p.txt", "prompt;ground-truth\na cat;1\n", "got the header"),
        ("p.txt", "image.path|prompt\nx.png|a cat\n", "got the header"),
        ("p.yaml", "- prompt: a cat\n", "got the header"),
        ("p.txt", "['a cat', 'a dog']\n", "got JSON"),
        ("p.txt", "{'prompt': 'a cat'}\n", "got JSON"),
        ("p.txt", '[\n "a cat",\n "a dog",\n]\n', "got JSON"),
        ("p.txt", '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n', "got JSON"),
        ("p.txt", "[]", "got JSON"),
        ("p.json", "a cat\na dog\n", "not valid JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "not valid JSON"),
        ("p.json", '"a cat"', "expected a JSON list"),
        ("p.json", '{"texts": ["a"]}', "expected a JSON list"),
        ("p.json", '[{"caption": "a"}]', "entry 0: got {'caption': 'a'}; .* one key prompt"),
        ("p.json", '[{"prompt": "a", "Prompt": "b"}]', "entry 0: got {'prompt'"),
        ("p.json", '["a", " "]', "entry 1: got ' '"),
        ("p.json", '["a", null]', "entry 1: got None"),
        ("p.json", '["a", 3]', "entry 1: got 3"),
        ("p.json", "[]", "is empty"),
        ("p.json", r'["a", "\ud800"]', r"entry 1: got '\\ud800' at character 1"),
        ("p.jsonl", "a cat\n", "line 1: not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]', r"line 2: got \['b'\]"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b\\u0000"}', r"line 3: got '\\x00'"),
        ("p.jsonl", "\n", "is empty"),
        ("p.csv", "a cat\na dog\n", r"got columns \['a cat'\]; expected one named prompt"),
        ("p.csv", "id;prompt\n1;a\n", "expected one named prompt, ',' between"),
        ("p.tsv", "id,prompt\n1,a\n", r"expected one named prompt, '\\t'"),
        ("p.csv", "prompt,prompt\na,b\n", "expected one named prompt"),
        ("p.csv", "prompt\na cat, sitting\n", "line 2: got 2 fields; expected 1"),
        ("p.csv", "id,prompt\n1\n", "line 2: got 1 fields; expected 2"),
        ("p.csv", "id,prompt\n1,\n", "line 2: got ''"),
        ("p.csv", 'prompt\n"a cat\na dog\n', "line 3: unexpected end of data"),
        ("p.csv", "prompt\n", "is empty"),
        ("p.csv", "", "got columns"),
        ("p.csv", "prompt\n" + "a" * 200_000, "field larger than field limit"),
        ("p.csv", "prompt\n" + "a" * 10_001, "line 2: got 10001 characters"),
        ("p.parquet", b"PAR1\x15\x04\xff", "UTF-8"),
    ],
)
def test_a_file_that_is_not_what_its_name_tells_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"prompt file .*{name}.*{message}"):
        read_prompts(written(tmp_path, name, content))


def test_a_large_file_is_read(tmp_path):
    lines = [f"prompt {number} of many" for number in range(200_000)]
    assert (
        read_prompts(written(tmp_path, "p.jsonl", "\n".join(json.dumps({"prompt": line}) for line in lines))) == lines
    )
