"""Recipes: YAML 1.2, layers, paths, and every fault at once with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multihead import recipe, strict_yaml
from multihead.errors import Problem, UserError
from multihead.recipe import Recipe
from multihead.task import find

BASIC = "task: text-generation\ndata:\n  train: a.txt\n"


def load(path: Path, *overrides: str) -> Recipe:
    return recipe.load(path, overrides, find=find)


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def faults(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return caught.value.problems


def scalar(text: str) -> Any:
    found: list[Problem] = []
    value = strict_yaml.parse(text, "here", found)
    assert not found
    return value


# -- YAML 1.2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("+.5", 0.5), ("1.", 1.0), ("-0", 0), ("+3", 3), (".inf", float("inf")),
    ("012", 12), ("0o14", 12), ("0x1F", 31), ("0b11", "0b11"), ("1_000", "1_000"), ("12:30:45", "12:30:45"),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("False", False),
    ("tRUE", "tRUE"), ("~", None), ("null", None), ("", None), ("2024-01-01", "2024-01-01"), ("=", "="),
    ("'012'", "012"), ("[1, a, no]", [1, "a", "no"]), ("{a: 1e-3}", {"a": 1e-3}), ("房间", "房间"), ("1.2.3", "1.2.3"),
])  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = scalar(text)
    assert found == value and type(found) is type(value)


WORDS = ["no", "1e-4", "012", "0o7", "1_0", "2024-01-01", "~", "", " a", "a: b", "#", "- x", "<<", "=", "1:30"]
scalars = (st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(WORDS) |
           st.text(st.characters(codec="utf-8")))
keys = st.sampled_from(["a", "b", "no", "true", "1", "x y", "~", "1e-4", "名"])
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
                     max_leaves=8)


@settings(max_examples=150, deadline=None)
@example({"a": "\x85", "b": ["x\u2028y"]})
@given(st.dictionaries(keys, plain, min_size=1))
def test_what_is_dumped_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = written(tmp_path_factory.getbasetemp() / "dumped.yaml", strict_yaml.dump(values))
    found: list[Problem] = []
    assert strict_yaml.read(path, found).values == values and not found
    inline = strict_yaml.inline(values)
    assert strict_yaml.parse(inline, "here", found) == values and len(inline.splitlines()) == 1


def test_a_dump_reads_the_same_in_yaml_1_1() -> None:
    values = {"a": "1e-4", "b": "no", "c": "0o14", "d": 1e-5, "e": "012", "f": "12:30", "g": [1, "1"]}
    assert yaml.safe_load(strict_yaml.dump(values)) == values


@pytest.mark.parametrize(("text", "line", "words"), [
    ("a: 1\nb: &x [1]\n", 2, "anchors"),
    ("a: 1\nb: *x\n", 2, "aliases"),
    ("a: !!python/object/apply:os.system [ls]\n", 1, "tags"),
    ("a: 1\nb: !!str 5\n", 2, "tags"),
    ("a:\n\t- 1\n", 2, "tabs"),
    ("a: 1\n b: 2\n", 2, "indentation"),
    ("a: 'x\n", 1, "not valid YAML"),
    ("a: 1\n---\na: 2\n", 2, "another document"),
    ("a: 1\n1: 2\n", 2, "a key is a name"),
    ("a: 1\n? [x]\n: 2\n", 2, "a key is a name"),
    ("a: 1\nno: \x07\n", 2, "U+0007"),
    ("a: 1" + "0" * 5000, 1, "digits"),
    ("a: " + "[" * 100, 1, "levels deep"),
    ("", 1, "holds none"),
    ("- task: x\n", 1, "holds none"),
    ("just words\n", 1, "holds none"),
])
def test_what_is_not_read_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = written(tmp_path / "r.yaml", text)
    (problem,) = faults(path)
    assert problem.where in (f"{path}:{line}", f"{path}:{line + 1}") and words in problem.message


@pytest.mark.timeout(60)
def test_traps_are_refused_at_once(tmp_path: Path) -> None:
    laughs = "a: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    assert "anchors" in faults(written(tmp_path / "laughs.yaml", laughs))[0].message
    assert "levels" in faults(written(tmp_path / "deep.yaml", "a: " + "[" * 100_000))[0].message
    assert "bytes" in faults(written(tmp_path / "large.yaml", "a: 1\n" * 1_000_000))[0].message


@pytest.mark.parametrize("data", [BASIC.encode("utf-16"), BASIC.replace("a.txt", "评论.txt").encode("gb18030")])
def test_another_encoding_is_named(tmp_path: Path, data: bytes) -> None:
    (problem,) = faults(written(tmp_path / "r.yaml", data))
    assert "UTF-8" in problem.message and problem.where.startswith(f"{tmp_path / 'r.yaml'}:")


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    found = load(written(tmp_path / "r.yaml", b"\xef\xbb\xbf" + BASIC.replace("\n", "\r\n").encode()))
    assert found.data.train == str(tmp_path / "a.txt")


# -- layers and paths --------------------------------------------------------------------------------------------------


def test_later_layers_win(tmp_path: Path) -> None:
    written(tmp_path / "base.yaml", BASIC + "train: {steps: 10, lr: 0.5, batch_size: 4}\nname: b\n")
    path = written(tmp_path / "r.yaml", "base: base.yaml\ntrain: {lr: 0.25, batch_size: 8}\n")
    found = load(path, "train.batch_size=16", "train.warmup=3", "train.warmup=5")
    settings = (found.train.steps, found.train.lr, found.train.batch_size, found.train.warmup, found.name)
    assert settings == (10, 0.25, 16, 5, "b")
    assert found.train.optimizer == "muon", "the task's own preference is the lowest layer"
    assert load(path, "train.optimizer=adamw").train.optimizer == "adamw"


def test_a_path_is_relative_to_the_folder_of_whoever_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "shared" / "base.yaml", BASIC.replace("a.txt", "[../x.txt, y/*.txt]") + "  valid: v.txt\n")
    path = written(tmp_path / "mine" / "r.yaml", "base: ../shared/base.yaml\ndata: {valid: w.txt}\n")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    data = load(Path("../mine/r.yaml"), "data.test=t.txt").data
    assert data.train == [str(tmp_path / "x.txt"), str(tmp_path / "shared/y/*.txt")]
    assert (data.valid, data.test) == (str(tmp_path / "mine/w.txt"), str(here / "t.txt"))
    assert load(path, f"data.train={tmp_path}/z.txt").data.train == str(tmp_path / "z.txt")


def test_a_task_file_is_found_from_the_recipe_and_from_the_run(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", "from multihead import Task\nclass Mine(Task):\n    pass\n")
    found = load(written(tmp_path / "r.yaml", BASIC.replace("text-generation", "./mine.py")))
    saved = written(tmp_path / "runs" / "x" / "recipe.yaml", found.dump())
    assert load(saved).task == str(tmp_path / "mine.py")


def test_variables_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "r.yaml", BASIC.replace("a.txt", '"${MULTIHEAD_DATA}/${SUB_1}/a.txt"'))
    monkeypatch.setenv("MULTIHEAD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SUB_1", "s")
    assert load(path).data.train == str(tmp_path / "data/s/a.txt")
    monkeypatch.delenv("MULTIHEAD_DATA")
    monkeypatch.chdir(tmp_path)
    assert load(path).data.train == str(tmp_path.parent / "shared/data/s/a.txt")
    monkeypatch.delenv("SUB_1")
    (problem,) = faults(path)
    assert problem == Problem("the environment has no variable SUB_1; set it, or write the path out", f"{path}:3")


def test_overrides_hold_lists_sections_and_null(tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", BASIC + "train: {clip: 2, early_stop: {patience: 3}}\n")
    found = load(path, "data.columns={text: 评论}", "options.prompts=[从前, 'a, b']", "train.clip=null",
                 "train.betas=[0.8, 0.9]", "data.split={by: group, group: user}", "train.early_stop.metric=loss",
                 "model.ngrams=[2, 3]")
    assert found.data.columns == {"text": "评论"} and found.options.prompts == ["从前", "a, b"]
    assert found.train.clip is None and found.train.betas == (0.8, 0.9) and found.model.ngrams == (2, 3)
    assert (found.data.split.by, found.data.split.group, found.data.split.test) == ("group", "user", 0.0)
    assert found.train.early_stop is not None and found.train.early_stop.patience == 3


def test_the_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    text = BASIC + """name: "1e-4"
seed: 7
options: {tokenizer: char, prompts: ["no", "0o14", "12:30"]}
train: {lr: 1e-5, minutes: 0.5, early_stop: {patience: 2}, threads: 1}
model: {ngrams: [2], dropout: 0}
serve: {rate_limit: 60/minute}
"""
    first = load(written(tmp_path / "r.yaml", text))
    again = load(written(tmp_path / "runs" / "recipe.yaml", first.dump()))
    assert again == first and again.dump() == first.dump()
    assert first.name == "1e-4" and first.options.prompts == ["no", "0o14", "12:30"]


def test_a_section_with_nothing_below_it_means_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", BASIC + "  split:\n  columns:\noptions:\nmodel:\ntrain:\nevaluate:\nserve:\n")
    assert load(path) == load(written(tmp_path / "x" / ".." / "r.yaml", BASIC))


@pytest.mark.parametrize("text", ["1e3", "1000.0", "1000"])
def test_whole_numbers_may_be_written_as_floats(tmp_path: Path, text: str) -> None:
    assert load(written(tmp_path / "r.yaml", BASIC), f"train.steps={text}").train.steps == 1000


def test_columns_may_be_numbers(tmp_path: Path) -> None:
    assert load(written(tmp_path / "r.yaml", BASIC), "data.columns.text=2").data.columns == {"text": "2"}


# -- faults ------------------------------------------------------------------------------------------------------------

WRONG = """task: text-generaton
name: ../x
seed: -1
data:
  train: [1, a.txt]
  splt: {valid: 0.1}
  encoding: 5
model:
  d_model: wide
  norm: layer
train:
  steps: fast
  lr: .nan
  lr: 1
  threads: many
  betas: [0.9]
  early_stop: 5
  min_lr: 2
evaluate: [1]
serve: {rate_limit: often, port: 99999}
xyz: 1
"""

EXPECTED = {
    1: ["text-generaton", "did you mean 'text-generation'"], 2: ["name", "../x"], 3: ["seed is -1", "≥ 0"],
    5: ["data.train.0 is 1", "text"], 6: ["data.splt", "did you mean 'split'", "deduplicate"],
    7: ["data.encoding", "quotes"], 9: ["model.d_model is \"wide\"", "a whole number"],
    10: ["model.norm", "'rmsnorm' or 'layernorm'"], 12: ["train.steps is \"fast\"", "a whole number"],
    14: ["given twice (first in line 13)"], 15: ["'auto' or a whole number"], 16: ["train.betas"],
    17: ["train.early_stop", "section"], 18: ["≤ 1"], 19: ["evaluate"], 20: ["99999", "60/minute"],
    21: ["unknown key 'xyz'", "evaluate, serve, base"],
}  # fmt: skip


def test_every_fault_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", WRONG)
    said: dict[int, str] = {}
    for problem in faults(path):
        name, _, line = problem.where.rpartition(":")
        assert name == str(path)
        said[int(line)] = said.get(int(line), "") + problem.message
    assert sorted(said) == sorted(EXPECTED)
    for number, words in EXPECTED.items():
        assert all(word in said[number] for word in words), (number, said[number])


def test_faults_of_options_the_base_and_the_command_line_have_their_own_places(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", "train:\n  batch_size: 0\nbase: other.yaml\n")
    path = written(tmp_path / "r.yaml", "base: base.yaml\n" + BASIC + "options:\n  contxt: 5\n")
    found = {p.where: p.message for p in faults(path, "train.lr=-1", "options.vocab_size=few", "steps")}
    assert "one layer" in found[f"{base}:3"] and "≥ 1" in found[f"{base}:2"]
    assert "did you mean 'context'" in found[f"{path}:6"]
    assert "> 0" in found["command line, train.lr=-1"] and "key=value" in found["command line, steps"]
    assert "a whole number" in found["command line, options.vocab_size=few"] and len(found) == 6


@pytest.mark.parametrize(("override", "words"), [
    ("train.steps=true", "a number"), ("train.lr=.inf", "finite"),
    ("train.batch_size=10 ", "micro_batch 4 does not divide"), ("train.betas=[0.9, 1.5]", "< 1"),
    ("train.betas=[0.9, 0.9, 0.9]", "2 values"), ("train.threads=0", "≥ 1"),
    ("train.device=gpu", "auto, cpu, cuda"), ("train.warmup=-1", "≥ 0"),
    ("train.early_stop={patience: 0}", "≥ 1"), ("model.num_heads=7", "does not divide"),
    ("model.dropout=.inf", "finite"), ("data.split.by=alphabet", "'random', 'order', 'group', 'last' or 'time'"),
    ("data.split.by=group", "needs `group:`"), ("data.split.group=user", "write `by: group`"),
    ("data.split={valid: 0.5, test: 0.5}", "leave nothing"), ("data.train=", "text or a list"),
    ("data.train='  '", "empty path"), ("data=[]", "section of keys"), ("name=.", "dot"),
    ("name=a/b", "none of them /"), ("name=", "text"), ("train=5", "section of keys"),
    ("base=x.yaml", "not on the command line"), ("data.delimiter=,", "in quotes"), ("train.lr=&a 1", "anchors"),
    ("train.optimizer=Muon", "did you mean 'muon'"), ("data.deduplicate=5", "true or false"),
    ("task=null", "task"), ("seed=2147483648", "< 2147483648"), ("serve.port=-1", "≥ 0"),
    ("options.tokenizer=word", "'bpe' or 'char'"),
])  # fmt: skip
def test_wrong_values(tmp_path: Path, override: str, words: str) -> None:
    path = written(tmp_path / "r.yaml", BASIC + "train: {batch_size: 8, micro_batch: 4}\n")
    found = faults(path, override)
    assert any(words in p.message for p in found), found
    assert all(p.where.startswith(("command line", str(path))) for p in found)


def test_early_stop_without_validation_rows_is_a_fault(tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", BASIC + "train:\n  early_stop: {}\n")
    (problem,) = faults(path, "data.split.valid=0")
    assert "data.split.valid" in problem.message and problem.where == f"{path}:5"


def test_what_must_be_given(tmp_path: Path) -> None:
    path = written(tmp_path / "r.yaml", "seed: 1\n")
    assert [str(p) for p in faults(path)] == [f"{path}:1: 'task' is missing; it must be given",
                                              f"{path}:1: 'data' is missing; it must be given"]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    written(tmp_path / "reviews.yaml", BASIC)
    (problem,) = faults(tmp_path / "review.yaml")
    assert "did you mean 'reviews.yaml'" in problem.message and "multihead init" in problem.message
    (problem,) = faults(tmp_path)
    assert "is a folder" in problem.message
    (problem,) = faults(written(tmp_path / "r.yaml", "base: review.yaml\n" + BASIC))
    assert "did you mean 'reviews.yaml'" in problem.message and problem.where == f"{tmp_path / 'r.yaml'}:1"


def test_messages_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "zh")
    path = written(tmp_path / "r.yaml", WRONG)
    found = faults(path, "x", "model.bias=7", "train.warmup=.nan")
    told = "\n".join(map(str, found))
    for words in ("是不是想写 'text-generation'", "应为 整数", "写了两次", "覆盖项写作", "应为 有限的数字",
                  "应为 'rmsnorm' 或 'layernorm'"):
        assert words in told
    english = [p for p in found if not any("\u4e00" <= c <= "\u9fff" for c in p.message)]
    assert not english
