"""The configuration: which value wins, and a line per mistake with its origin and the right key."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from vlm4rec_spark.config import _RENAMED, CONF, Config, load
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.stages.recommend import RecommendSettings

TOO_SMALL = "Input should be greater than or equal to 1"


def refusal(files: tuple[Path, ...] = (), *assignments: str) -> str:
    with pytest.raises(UsageError) as error:
        load(files, assignments)
    return str(error.value)


def all_keys(model: BaseModel) -> dict:
    """Every key of the model down to the leaves, nested as in base.yaml."""
    values = {name: getattr(model, name) for name in type(model).model_fields}
    return {
        name: all_keys(value) if isinstance(value, BaseModel) else ...
        for name, value in values.items()
    }


def written_keys(content: dict, expected: dict) -> dict:
    """The keys of `content`, as deep as `expected` has sections."""
    return {
        key: written_keys(value, expected[key]) if isinstance(expected[key], dict) else ...
        for key, value in content.items()
    }


@pytest.fixture
def config_file(tmp_path) -> Path:
    return tmp_path / "own.yaml"


def test_base_yaml_has_the_defaults_and_every_key():
    content = yaml.safe_load((CONF / "base.yaml").read_text())
    expected = all_keys(Config())
    assert load().model_dump() == Config().model_dump()
    assert written_keys(content, expected) == expected


def test_lines_of_base_yaml_are_short():
    lines = (CONF / "base.yaml").read_text().splitlines()
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("file", sorted(path.name for path in CONF.glob("*.yaml")))
def test_every_packaged_file_loads_by_its_name(file: str, monkeypatch, tmp_path):
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


def test_later_files_win_and_assignments_win_over_files(tmp_path):
    first = tmp_path / "first.yaml"
    second = tmp_path / "second.yaml"
    first.write_text("recommend: {k: 1, target_recall: 0.5}\nprofiles: {last_n: 7}\n")
    second.write_text("recommend: {k: 2}\n")
    config = load(
        [first, second], ["recommend.recall_sample=3", "profiles.last_n=8", "profiles.last_n=9"]
    )
    assert config.recommend == RecommendSettings(k=2, target_recall=0.5, recall_sample=3)
    assert config.profiles.last_n == 9
    assert load([second, first]).recommend.k == 1


def test_a_file_here_comes_before_the_packaged_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test.yaml").write_text("recommend: {k: 3}\n")
    config = load([Path("test.yaml")])
    assert (config.recommend.k, config.embed.encoder) == (3, "minilm")


def test_an_empty_file_changes_nothing(config_file: Path):
    config_file.write_text("# nothing yet\n")
    assert load([config_file]) == Config()


def test_assigned_values_are_yaml():
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


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().tables = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("tables: t\nrecomend:\n  k: 3\n", 2, "'recomend'. Did you mean 'recommend'?"),
        (
            "recommend:\n  target_recal: 0.9\n",
            2,
            "'recommend.target_recal'. Did you mean 'recommend.target_recall'?",
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
    config_file: Path, text: str, line: int, message: str
):
    config_file.write_text(text)
    assert refusal((config_file,)) == f"{config_file}, line {line}: unknown key {message}"


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
            f"recommend.k: {TOO_SMALL} (it is 0).",
        ),
        (
            "recommend:\n  target_recall: 1.5\n",
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
def test_a_wrong_type_or_an_impossible_value_has_file_and_line(
    config_file: Path, text: str, line: int, message: str
):
    config_file.write_text(text)
    assert refusal((config_file,)) == f"{config_file}, line {line}: {message}"


@pytest.mark.parametrize("old", _RENAMED)
def test_an_old_key_is_refused_with_its_new_name(old: str):
    key, _, value = old.partition(": ")
    assert f"{old} is called {_RENAMED[old]} now" in refusal((), f"{key}={value or 1}")


def test_new_names_are_valid_keys():
    for new in _RENAMED.values():
        section = all_keys(Config())
        for part in new.partition(": ")[0].split("."):
            assert part in section, new
            section = section[part]


def test_an_old_section_names_its_old_keys_too(config_file: Path):
    config_file.write_text("\ncooccurrence: {share: 0.2, kept: 50}\n")
    assert refusal((config_file,)) == (
        f"{config_file}, line 2: cooccurrence is called item_item now, "
        "cooccurrence.kept is called item_item.max_neighbors now."
    )
    arm = "evaluate.custom_arms={x: {cooccurrence: {share: 0.2}}}"
    assert refusal((), arm) == f"--set {arm}: cooccurrence is called item_item now."


def test_every_mistake_has_a_line(config_file: Path):
    config_file.write_text("recommend: {k: 0}\nembed: {words: 3}\n")
    assert refusal((config_file,), "profiles.last_m=1").splitlines() == [
        f"{config_file}, line 2: unknown key 'embed.words'. Did you mean 'embed.max_words'?",
        "--set profiles.last_m=1: unknown key 'profiles.last_m'. Did you mean 'profiles.last_n'?",
        f"{config_file}, line 1: recommend.k: {TOO_SMALL} (it is 0).",
    ]


@pytest.mark.parametrize("assignment", ["recommend.k", "=3", "--k"])
def test_an_assignment_needs_a_key_and_an_equals_sign(assignment: str):
    assert (
        refusal((), assignment)
        == f"--set {assignment!r}: write it as key=value, such as --set recommend.k=20."
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "recommend.k=-1",
            f"--set recommend.k=-1: recommend.k: {TOO_SMALL} (it is -1).",
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
def test_a_wrong_assignment_is_shown_as_it_was_written(assignment: str, message: str):
    assert refusal((), assignment) == message


def test_a_missing_file_is_refused_with_the_folders_that_were_searched():
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
def test_a_file_that_is_not_a_configuration_is_one_line(
    config_file: Path, data: bytes, message: str
):
    config_file.write_bytes(data)
    line = refusal((config_file,))
    assert line.startswith(f"--config {config_file}")
    assert message in line
    assert "\n" not in line


def test_a_folder_is_not_a_configuration(tmp_path):
    assert refusal((tmp_path,)).startswith(f"--config {tmp_path} can't be read: ")


def test_keys_that_are_not_text_are_unknown(config_file: Path):
    config_file.write_text("1: x\n")
    assert refusal((config_file,)).startswith(f"{config_file}, line 1: ")
