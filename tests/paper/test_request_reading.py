from pathlib import Path

import pytest
import torch

from milora.methods import METHODS, method
from milora.paper.request_checks import check_trainings, kinds_of
from milora.paper.request_reading import parse_settings, read_request, section_name
from milora_core.errors import MiLoraError


def write(path: Path, text: str) -> Path:
    file = path / "report.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_override_a_file_and_mappings_are_merged(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "tasks: bundled-choice, bundled-yesno\nseeds: [0, 1]\nsections: [1, figure-2]\n"
        "training: {max_steps: 5, learning_rate: 1e-3}\nevaluation: {beams: 1}\ntune: {learning_rate: [1e-3, 1e-2]}\n",
    )
    request = read_request(file, {"seeds": [3], "training": {"max_steps": 7}})
    assert request.tasks == ("bundled-choice", "bundled-yesno")
    assert request.seeds == (3,)
    assert request.sections == ("table1", "figure2")
    # 1e-3 is a text for YAML 1.1.
    assert request.training == {"max_steps": 7, "learning_rate": 0.001}
    assert request.evaluation.beams == 1
    assert request.tune == {"learning_rate": (0.001, 0.01)}


def test_the_committed_recipe_is_valid() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "report-bundled.yaml"
    request = read_request(recipe, {})
    assert request.seeds == (0, 1, 2)
    assert "table1" in request.sections


def test_a_method_s_own_settings() -> None:
    own = {"ia3": {"learning_rate": 0.1, "projection_dim": 3}, "lora": {"learning_rate": [1, 2]}}
    values = {"training": {"max_steps": 5, "learning_rate": 9.0}, "tune": {"learning_rate": [3, 4]}, "methods": own}
    request = read_request(None, values)
    # A number fixes what is tuned for the others, and a list is tried in its place.
    assert request.tuned("ia3") == {}
    assert request.training_of("ia3") == {"max_steps": 5, "learning_rate": 0.1}
    assert request.settings_of("ia3") == {"projection_dim": 3}
    assert request.tuned("lora") == {"learning_rate": (1, 2)}
    assert request.tuned("dora") == {"learning_rate": (3, 4)}
    assert request.training_of("dora") == {"max_steps": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold a mapping"),
        ("a: [", "is no YAML"),
        ("task: [boolq]", "'task'.*did you mean 'tasks'"),
        ("tasks: [bolq]", "no task 'bolq'.*'boolq'"),
        ("sections: [table9]", "no section 'table9'"),
        ("training: {max_step: 3}", "training: there is no 'max_step'.*'max_steps'"),
        ("methods: {milor: {}}", "methods: there is no 'milor'.*'milora'"),
        ("methods: {milora: {topk: 3}}", "methods: milora: there is no 'topk'.*'top_k'"),
        ("evaluation: {beam: 3}", "evaluation has no field 'beam'"),
        ("evaluation: {beams: 0}", "beams must be a whole number of at least 1"),
        ("seeds: []", "seeds must be"),
        ("tune_by: loss", "tune_by must be"),
        ("tune: {learning_rate: [1]}\ntune_by: accuracy", "dev_rows"),
        ("budget: large", "budget must be"),
        ("limits: {figure3: {value: [1]}}", "limits of figure3: there is no 'value'"),
        ("evaluation:", "evaluation must be a mapping, as in 'evaluation: {beams: 1}'; found nothing"),
        ("evaluation: {beams: null}", "beams must be a whole number of at least 1; found nothing"),
        ("evaluation: {beams: true}", "beams must be a whole number"),
        ("tune:", "tune must be a mapping.*found nothing"),
        ("tune: {learning_rate: {a: 1}}", "tune: learning_rate must be a list"),
        ("tune: {learning_rate: []}", "at least one value"),
        ("tune: {learning_rate: [much]}", "tune: learning_rate must be a number; found 'much'"),
        ("methods: [lora]", "methods must be a mapping"),
        ("methods: {lora: 3}", "methods: lora must be a mapping, as in 'methods: {lora"),
        ("methods: {lora: {learning_rate: [1e-3, 1e-2]}}", "lora: learning_rate is a list.*add 'tune: {learning_rate"),
        ("methods: {milora: {r: [8, 16]}}", "methods: milora: r must be a whole number"),
        ("limits: {figure3: {values: [2.5]}}", "figure3: values must be whole numbers"),
        ("limits: {figure4: {values: [much]}}", "figure4: values must be numbers"),
        ("limits: {figure4: {seeds: [-1]}}", "figure4: seeds must be whole numbers"),
        ("limits: {figure4: 3}", "limits: figure4 must be a mapping"),
        ("tasks: {boolq: 1}", "tasks must be a list"),
        ("tasks: [[boolq]]", "tasks must be a list"),
        ("backbone: 7", "backbone must be a text"),
        ("threads: many", "threads must be a whole number"),
        ("budget: -1", "budget must be"),
        ("other_backbones: {Gemma 2B: 2}", "other_backbones: 'Gemma 2B' must name"),
        ("judge_url: localhost", "must begin with http"),
        ("data: {train_rows: many}", "data: train_rows must be a whole number or null; found 'many'"),
        ("training: {max_steps: many}", "training: max_steps must be a whole number; found 'many'"),
        ("training: {save_strategy: no}", "save_strategy must be a text .in quotes.*found False"),
        ("training: {eval_steps: 300}", "settings of training are refused: .*300"),
        ("training: {activation_training: both}", "activation_training must be one of"),
        ("methods: {lora: {save_steps: 7}}", "methods: lora: The settings of training are refused"),
        ("tune: {bilevel_every: [1, 0]}", "bilevel_every must be at least 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MiLoraError, match=message) as caught:
        read_request(write(tmp_path, text), {})
    assert "\n" not in str(caught.value)


def test_a_single_value_is_a_list_of_one(tmp_path: Path) -> None:
    text = "limits: {figure3: {tasks: bundled-choice, values: 3, seeds: 1}}\ntasks: bundled-choice\nseeds: 2\n"
    request = read_request(write(tmp_path, text), {})
    assert request.limits == {"figure3": {"tasks": ("bundled-choice",), "values": (3,), "seeds": (1,)}}
    assert (request.tasks, request.seeds) == (("bundled-choice",), (2,))


def test_what_only_another_machine_can_do_is_refused_where_runs_are_made_and_nowhere_else() -> None:
    # TF32 needs a GPU of some kinds, bf16 one or a CPU that is named.
    values = {"training": {"tf32": True, "bf16": True}, "only_methods": ["lora"]}
    request = read_request(None, values)
    if torch.cuda.is_available():
        pytest.skip("this machine can do it")
    with pytest.raises(MiLoraError, match="settings of training are refused"):
        check_trainings(request, here=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_kinds_of_every_method_s_fields_can_be_told(name: str) -> None:
    assert kinds_of(method(name).config_class)


def test_settings_and_names_from_the_command_line() -> None:
    assert parse_settings(["max-steps=3", "use_cpu=true", "lr_scheduler_type=cosine", "a=1e-3"]) == {
        "max_steps": 3,
        "use_cpu": True,
        "lr_scheduler_type": "cosine",
        "a": 0.001,
    }
    with pytest.raises(MiLoraError, match="name=value"):
        parse_settings(["max_steps"])
    assert [section_name(name) for name in ("1", "Table 2", "figure-3", "router_choices")] == [
        "table1",
        "table2",
        "figure3",
        "router-choices",
    ]
