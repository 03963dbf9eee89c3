"""The configuration: where values come from, and one line per mistake with its place and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from vlm4rec_spark.config import CONF, Config, load
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.stages.recommend import RecommendSettings


def refusal(files: tuple[Path, ...] = (), *assignments: str) -> str:
    with pytest.raises(UsageError) as refused:
        load(files, assignments)
    return str(refused.value)


def keys(model: BaseModel) -> dict:
    """Every key of the model down to the leaves, as base.yaml would have to name them."""
    values = {name: getattr(model, name) for name in type(model).model_fields}
    return {
        name: keys(value) if isinstance(value, BaseModel) else ... for name, value in values.items()
    }


def named(content: dict, shape: dict) -> dict:
    return {
        key: named(value, shape[key]) if isinstance(shape[key], dict) else ...
        for key, value in content.items()
    }


@pytest.fixture
def yours(tmp_path: Path) -> Path:
    return tmp_path / "yours.yaml"


def test_base_yaml_says_the_defaults_and_names_every_key() -> None:
    content = yaml.safe_load((CONF / "base.yaml").read_text())
    assert load().model_dump() == Config().model_dump()
    assert named(content, keys(Config())) == keys(Config())


@pytest.mark.parametrize("file", sorted(path.name for path in CONF.glob("*.yaml")))
def test_every_packaged_file_loads_by_its_name(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load([Path(file)]) == Config.model_validate(_over_base(file))


def _over_base(file: str) -> dict:
    merged = Config().model_dump()
    for key, value in yaml.safe_load((CONF / file).read_text()).items():
        merged[key] = _over(merged[key], value)
    return merged


def _over(old: object, new: object) -> object:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _over(old.get(key), value) for key, value in new.items()}
    return new


def test_later_files_win_and_assignments_win_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("recommend: {k: 1, recall: 0.5}\nprofiles: {last_n: 7}\n")
    second.write_text("recommend: {k: 2}\n")
    config = load(
        [first, second], ["recommend.recall_sample=3", "profiles.last_n=8", "profiles.last_n=9"]
    )
    assert config.recommend == RecommendSettings(k=2, target_recall=0.5, recall_sample=3)
    assert config.profiles.last_n == 9
    assert load([second, first]).recommend.k == 1


def test_a_file_here_comes_before_the_packaged_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test.yaml").write_text("recommend: {k: 3}\n")
    config = load([Path("test.yaml")])
    assert (config.recommend.k, config.embed.encoder) == (3, "minilm")


def test_an_empty_file_changes_nothing(yours: Path) -> None:
    yours.write_text("# nothing yet\n")
    assert load([yours]) == Config()


def test_assigned_values_are_yaml() -> None:
    config = load(
        (),
        [
            "evaluate.arms=[title, random]",
            "profiles.half_life_days=null",
            "spark.master=null",
            "evaluate.cut=2025-05-01",
            "spark.conf={spark.ui.enabled: 'true'}",
            "tables=a=b",
        ],
    )
    assert config.evaluate.arms == ("title", "random")
    assert config.profiles.half_life_days is None
    assert config.spark.master is None
    assert config.evaluate.cut == "2025-05-01"
    assert config.spark.conf == {"spark.ui.enabled": "true"}
    assert config.tables == "a=b"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().tables = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("tables: t\nrecomend:\n  k: 3\n", 2, "'recomend'. Did you mean 'recommend'?"),
        (
            "recommend:\n  recal: 0.9\n",
            2,
            "'recommend.recal'. Did you mean 'recommend.target_recall'?",
        ),
        (
            "caption:\n  model:\n\n    modle: x\n",
            4,
            "'caption.model.modle'. Did you mean 'caption.model.model'?",
        ),
        (
            "ingest:\n  items:\n    paths: [a]\n",
            3,
            "'ingest.items.paths'. Did you mean 'ingest.items.path'?",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_one_with_file_and_line(
    yours: Path, text: str, line: int, message: str
) -> None:
    yours.write_text(text)
    assert refusal((yours,)) == f"{yours}, line {line}: unknown key {message}"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "recommend:\n  k: ten\n",
            2,
            "recommend.k: Input should be a valid integer, unable to parse string as an "
            "integer (it is 'ten').",
        ),
        (
            "recommend:\n  k: 0\n",
            2,
            "recommend.k: Input should be greater than or equal to 1 (it is 0).",
        ),
        (
            "recommend:\n  recall: 1.5\n",
            2,
            "recommend.target_recall: Input should be less than or equal to 1 (it is 1.5).",
        ),
        (
            "representation: look\n",
            1,
            "representation: Input should be 'title', 'caption' or 'title_caption' (it is 'look').",
        ),
        ("tables:\n", 1, "tables: Input should be a valid string (it is None)."),
        (
            "\nrecommend: 3\n",
            2,
            "recommend: Input should be a valid dictionary or instance of RecommendSettings "
            "(it is 3).",
        ),
        (
            "evaluate:\n  arms:\n  - title\n  - 5\n",
            2,
            "evaluate.arms.1: Input should be a valid string (it is 5).",
        ),
    ],
)
def test_a_wrong_type_or_an_impossible_value_is_said_with_file_and_line(
    yours: Path, text: str, line: int, message: str
) -> None:
    yours.write_text(text)
    assert refusal((yours,)) == f"{yours}, line {line}: {message}"


def test_every_mistake_has_a_line(yours: Path) -> None:
    yours.write_text("recommend: {k: 0}\nembed: {words: 3}\n")
    assert refusal((yours,), "profiles.last_m=1").splitlines() == [
        f"{yours}, line 2: unknown key 'embed.words'. Did you mean 'embed.max_words'?",
        "--set profiles.last_m=1: unknown key 'profiles.last_m'. Did you mean 'profiles.last_n'?",
        f"{yours}, line 1: recommend.k: Input should be greater than or equal to 1 (it is 0).",
    ]


@pytest.mark.parametrize("assignment", ["recommend.k", "=3", "--k"])
def test_an_assignment_needs_a_key_and_an_equals_sign(assignment: str) -> None:
    assert (
        refusal((), assignment)
        == f"--set {assignment!r}: write it as key=value, such as --set recommend.k=20."
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "recommend.k=-1",
            "--set recommend.k=-1: recommend.k: Input should be greater than or equal to 1 (it is -1).",
        ),
        (
            "recommend.k.x=1",
            "--set recommend.k.x=1: recommend.k: Input should be a valid integer (it is {'x': 1}).",
        ),
        ("tables=[a", "--set 'tables=[a': the value isn't YAML."),
        ("last_n=3", "--set last_n=3: unknown key 'last_n'. Did you mean 'profiles.last_n'?"),
        ("embed.k=3", "--set embed.k=3: unknown key 'embed.k'. Did you mean 'recommend.k'?"),
    ],
)
def test_a_wrong_assignment_is_shown_as_it_was_written(assignment: str, message: str) -> None:
    assert refusal((), assignment) == message


def test_a_file_that_is_not_there_says_where_it_was_looked_for() -> None:
    assert (
        refusal((Path("nowhere.yaml"),))
        == f"--config nowhere.yaml: there is no such file, here or in {CONF}."
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- a\n- b\n", "expected keys and values at the top, found a list."),
        (b"just words", "expected keys and values at the top, found a str."),
        (b"recommend: {k: 1", "can't be read: while parsing a flow mapping"),
        (b"\xff\xfe\x00", "can't be read: 'utf-8' codec can't decode byte 0xff"),
        (
            b"k: !!python/object:os.system x",
            "can't be read: could not determine a constructor for the tag",
        ),
    ],
    ids=["list", "text", "torn", "binary", "python object"],
)
def test_a_file_that_is_no_configuration_is_one_line(
    yours: Path, data: bytes, message: str
) -> None:
    yours.write_bytes(data)
    said = refusal((yours,))
    assert said.startswith(f"--config {yours}") and message in said
    assert "\n" not in said


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert refusal((tmp_path,)).startswith(f"--config {tmp_path} can't be read: ")


def test_keys_that_are_no_text_are_refused_as_unknown(yours: Path) -> None:
    yours.write_text("1: x\n")
    assert refusal((yours,)).startswith(f"{yours}, line 1: ")
