"""celora.tasks.causal_lm and celora.models.language: what is predicted, what it costs, and what is answered."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from celora import data
from celora.core.adapters import Lora, modules
from celora.errors import DataError, ModelError
from celora.models import families
from celora.models.backbone import Backbone, load
from celora.models.batching import BatchedForward
from celora.models.export import load_export
from celora.models.language import ABSENT, LanguageHead
from celora.models.loading import quiet
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.models.tokens import TextTokenizer, TokenRows
from celora.tasks.causal_lm import CausalLm
from celora.tasks.grading import exact, rouge_l
from celora.tasks.prompts import alpaca
from tests.language import FAMILIES, VOCABULARY, saved, tokenizer

ROOM = 1 << 20
ROWS = [
    {"prompt": "what is ice? ", "completion": "cold water."},
    {"prompt": "who is it? ", "completion": "the cat, again and again!"},
    {"prompt": "a? ", "completion": "b"},
]
Loaded = Callable[..., Backbone]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    @cache
    def of(family: str = "llama", max_length: int = 64, begins: bool = False) -> Backbone:
        folder = saved(tmp_path_factory.mktemp(family), family, begins=begins)
        model = Model(backbone=str(folder), max_length=max_length, device="cpu")
        return load(model, Adapter(rank=2, targets=(FAMILIES[family][1],)), folder, "causal-lm")

    return of


def models(backbone: Backbone, task: CausalLm) -> SharedBackbone:
    return SharedBackbone(
        backbone, task, model=backbone._model, adapter=Adapter(rank=2), family=Lora(), seed=0, budget=ROOM
    )


def encoded(task: CausalLm, rows: Any, most: int = 200, *, begins: bool = False) -> list[Any]:
    return task._encoded(TextTokenizer(tokenizer(begins=begins), most), rows)


def predicted(row: Any) -> str:
    return "".join(VOCABULARY[id] for id, one in zip(row.ids, row.is_target, strict=True) if one)


def whole(row: Any) -> str:
    return "".join(VOCABULARY[id] for id in row.ids)


def weights_of(backbone: Backbone, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{name}.{part}": torch.randn(*shape, generator=draw) / 4
        for name, (d_out, d_in) in backbone.targets.items()
        for part, shape in (("A", (2, d_in)), ("B", (d_out, 2)))
    }


# --- what is predicted ---------------------------------------------------------------------------------------------


def test_of_a_prompt_and_its_completion_the_completion_and_the_end_are_predicted() -> None:
    (row,) = encoded(CausalLm(), [{"prompt": "ask: ", "completion": "told."}])
    assert whole(row) == "ask: told.</s>"
    assert predicted(row) == "told.</s>"
    assert (row.size, row.cut) == (5, 0)
    (row,) = encoded(CausalLm(loss_on="everything"), [{"prompt": "ask: ", "completion": "told."}])
    assert predicted(row) == "sk: told.</s>"  # never the first, which nothing stands before


def test_of_a_text_everything_after_its_beginning_is_predicted() -> None:
    (row,) = encoded(CausalLm(), ["a text"])
    assert predicted(row) == " text</s>"
    (row,) = encoded(CausalLm(), ["a text"], begins=True)
    assert whole(row) == "<s>a text</s>"
    assert predicted(row) == "a text</s>"


def test_of_messages_what_the_assistant_says_is_predicted_in_every_turn() -> None:
    said = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "no")]
    (row,) = encoded(CausalLm(), [{"messages": [{"role": role, "content": text} for role, text in said]}])
    assert whole(row) == "<user>hi<end><assistant>hello<end><user>more<end><assistant>no<end>"
    assert predicted(row) == "hello<end>no<end>"


def test_instructions_are_written_in_alpacas_words_and_prompts_by_the_chat_template_if_it_is_asked_for() -> None:
    of = {"instruction": "add", "input": "1 2", "output": "3"}
    task, row = CausalLm(), None
    (row,) = encoded(task, [of], 500)
    assert predicted(row) == "3</s>"
    assert whole(row).endswith("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert "### Input" not in alpaca("add")
    (row,) = encoded(CausalLm(template="chat"), [{"prompt": "hi", "completion": "yes"}])
    assert whole(row) == "<user>hi<end><assistant>yes<end>"
    assert predicted(row) == "yes<end>"


def test_a_row_that_is_too_long_loses_the_left_of_its_prompt_first() -> None:
    (row,) = encoded(CausalLm(), [{"prompt": "abcdefgh", "completion": "12345"}], 9)
    assert whole(row) == "fgh12345</s>"
    assert (predicted(row), row.cut, row.size) == ("12345</s>", 5, 5)
    (row,) = encoded(CausalLm(), [{"prompt": "abcdefgh", "completion": "12345"}], 4)
    assert whole(row) == "h123"  # one token of the prompt stays, and of the answer what fits
    assert (predicted(row), row.size) == ("123", round(5 * 3 / 6))
    (row,) = encoded(CausalLm(), [{"prompt": "abcdefgh", "completion": "12345"}], 9, begins=True)
    assert whole(row) == "<s>gh12345</s>"


def test_a_notice_says_how_many_rows_were_cut_and_by_how_much() -> None:
    task, text = CausalLm(), TextTokenizer(tokenizer(), 9)
    rows = TokenRows(partial(task._encoded, text), [{"prompt": "a" * n, "completion": "b"} for n in (3, 9, 21)], ROOM)
    assert rows.notices == (
        "2 of 3 rows do not fit into model.max_length and are cut, from the left of the prompt first: by 8 tokens in "
        "the median, 14 at most",
    )
    assert not TokenRows(partial(task._encoded, text), [{"prompt": "a", "completion": "b"}], ROOM).notices


def test_messages_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found the message \{'from': 'human'\}; expected role"):
        encoded(CausalLm(), [{"messages": [{"from": "human"}]}])
    plain = tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        CausalLm()._encoded(TextTokenizer(plain, 9), [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(DataError, match=r'found rows of messages with task.template = "plain"'):
        encoded(CausalLm(template="plain"), [{"messages": [{"role": "user", "content": "a"}]}])


def test_the_form_of_a_source_is_found_by_its_columns(tmp_path: Path) -> None:
    def read(*records: dict[str, Any], **settings: Any) -> data.Table:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return data.read(data.Data(source="rows.jsonl", **settings), tmp_path, CausalLm().forms)

    assert read(*ROWS).inputs[1] == ROWS[1]
    assert read({"text": "a"}, {"text": "b"}).inputs[1] == "b"
    assert read({"question": "a", "answer": "b"}, columns={"prompt": "question", "completion": "answer"}).inputs[0] == {
        "prompt": "a", "completion": "b",
    }  # fmt: skip
    found = read({"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e", "label": "x"})
    assert [*found.inputs] == [
        {"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"},
    ]  # fmt: skip
    assert found.labels == ["", "x"]
    left = read(*ROWS, {"prompt": "alone"})
    assert len(left) == 3
    assert left.notices == ("rows.jsonl: 1 row without a completion was left out (first: line 4)",)
    with pytest.raises(DataError, match=r"has no column 'messages'"):
        data.read(data.Data(source="rows.jsonl"), tmp_path, [CausalLm(form="messages").forms[0]])
    with pytest.raises(DataError, match=r"data\.columns names 'answer', which the task does not read"):
        read(*ROWS, columns={"answer": "completion"})


def test_labels_of_rows_that_need_none_are_groups_and_no_cause_for_a_notice(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"a {at}", "completion": "b", "label": f"group {at % 2}", "site": f"s{at % 2}"} for at in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = data.load(data.Data(source="rows.jsonl", client="site"), tmp_path, 0, CausalLm())
    assert not held.notices
    assert len(held.clients) == 2


# --- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers_on_the_same_targets(family: str, loaded: Loaded) -> None:
    backbone, task = loaded(family), CausalLm()
    examples = task.read(data.Table(ROWS, [""] * 3, None, None, []), models(backbone, task))  # type: ignore[arg-type]
    forward = BatchedForward(AdaptedBackbone(backbone, Lora()), task)
    batch = forward.batch(Rows(examples, range(3)), range(3))
    with quiet(), torch.no_grad():
        theirs = t.AutoModelForCausalLM.from_pretrained(backbone.source).eval()
        expected = theirs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        torch.testing.assert_close(forward.losses({}, batch), expected, atol=1e-5, rtol=1e-5)
    own = backbone.text_tokenizer.ids([row["completion"] for row in ROWS])
    assert task.count(batch) == sum(len(ids) + 1 for ids in own)


def test_logits_are_never_more_than_a_chunk_and_chunks_change_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = loaded().head
    assert head is not None
    states = torch.randn(2, 9, 16, requires_grad=True)
    labels = torch.randint(7, 20, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, ABSENT)
    seen = []
    plain = LanguageHead.logits
    monkeypatch.setattr(LanguageHead, "logits", lambda self, x: seen.append(len(x)) or plain(self, x))
    monkeypatch.setattr(head, "chunk", 3)
    found = head.losses(states, labels)
    (gradient,) = torch.autograd.grad((found * torch.arange(18.0).view(2, 9)).sum(), states)
    assert max(seen) == 3
    all_logits = plain(head, states[:, :-1].flatten(0, 1)).view(2, 8, -1)
    expected = torch.nn.functional.cross_entropy(all_logits.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(found[:, 1:], expected)
    weighted = (expected * torch.arange(18.0).view(2, 9)[:, 1:]).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(weighted, states)[0])


def test_second_derivatives_are_right(loaded: Loaded) -> None:
    head = loaded().head
    assert head is not None
    states, labels = torch.randn(1, 5, 16, requires_grad=True), torch.tensor([[ABSENT, 9, ABSENT, 8, 7]])

    def twice(losses: Callable[..., torch.Tensor]) -> torch.Tensor:
        (slope,) = torch.autograd.grad(losses(states, labels).square().sum(), states, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), states)[0]

    def plain(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head.logits(x[0, :-1]), ids[0, 1:], reduction="none")

    torch.testing.assert_close(twice(head.losses), twice(plain), atol=1e-5, rtol=1e-4)


def test_rows_without_a_target_cost_nothing(loaded: Loaded) -> None:
    head = loaded().head
    assert head is not None
    states = torch.randn(2, 4, 16, requires_grad=True)
    found = head.losses(states, torch.full((2, 4), ABSENT))
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), states)[0].any()


def test_metrics_of_a_split_are_sums_over_tokens_and_bytes(loaded: Loaded) -> None:
    task = CausalLm(answer_tokens=3)
    found = task.measure(torch.tensor([[3.0, 2, 4, 1, 0.5], [5.0, 6, 12, 0, 0]]))
    assert found["loss"] == pytest.approx(8 / 8)
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["bits_per_byte"] == pytest.approx(8 / math.log(2) / 16)
    assert (found["exact_match"], found["rouge_l"]) == (0.5, 0.25)
    assert [metric.name for metric in task.metrics] == ["loss", "perplexity", "bits_per_byte", "exact_match", "rouge_l"]
    with pytest.raises(ValueError, match="needs answers: set answer_tokens"):
        CausalLm(score="rouge_l")


def test_a_model_that_reads_the_tokens_it_predicts_is_refused(tmp_path: Path) -> None:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = t.BertConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, initializer_range=0.5,
        )  # fmt: skip
        t.BertLMHeadModel(config).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a causal language model"):
        load(Model(backbone=str(tmp_path), device="cpu"), Adapter(targets=("query",)), tmp_path, "causal-lm")


# --- what it answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_greedy_generation(family: str, loaded: Loaded) -> None:
    backbone = loaded(family)
    prompts = CausalLm().prompts(["what is ice?", "a", {"prompt": "who are you?"}], backbone.text_tokenizer)
    found = backbone.answers(prompts, {}, 12)
    with quiet():
        theirs = t.AutoModelForCausalLM.from_pretrained(backbone.source).eval()
        for prompt, answer in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt])
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            assert answer == backbone.text_tokenizer.text(made[0, len(prompt) :].tolist())
    assert any(found)


def test_clients_answer_in_one_pass_as_they_do_alone(loaded: Loaded) -> None:
    backbone = loaded()
    network = AdaptedBackbone(backbone, Lora())
    own = [weights_of(backbone, seed) for seed in (1, 2, 3)]
    prompts = [[9, 10, 11], [12], [20, 8, 9, 10, 30]]
    both = {name: torch.stack([one[name] for one in own]) for name in own[0]}
    together = network.answers(both, [prompt for _ in own for prompt in prompts], 8)
    alone = [answer for one in own for answer in network.answers(one, prompts, 8)]
    assert together == alone
    assert len(set(together)) > 3


def test_generated_answers_are_graded_beside_the_loss(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = loaded(), CausalLm(answer_tokens=5, score="exact_match")
    examples = task.read(data.Table(ROWS, [""] * 3, None, None, []), models(backbone, task))  # type: ignore[arg-type]
    asked = []

    def answers(self: Any, weights: Any, prompts: Any, most: int, batch: Any = None) -> list[str]:
        asked.extend(prompts)
        return ["Cold  water.", "the cat, again", "b"]

    monkeypatch.setattr(AdaptedBackbone, "answers", answers)
    monkeypatch.setattr(AdaptedBackbone, "pieces", lambda self, lengths: [[0, 1, 2]])

    class Learner:
        initial = families.initial(backbone.targets, Adapter(rank=2), Lora(), {}, 0)

        def rows(self, split: str) -> Rows:
            return Rows(examples, range(3))

    (found,) = BatchedForward(AdaptedBackbone(backbone, Lora()), task).scores([(Learner(), {}, "test", None)])
    assert ["".join(VOCABULARY[id] for id in ids) for ids in asked] == [row["prompt"] for row in ROWS]
    assert found["score"] == found["exact_match"] == pytest.approx(2 / 3)
    assert found["rouge_l"] == pytest.approx((1 + rouge_l("the cat, again", ROWS[1]["completion"]) + 1) / 3)


def test_gsm8ks_final_number_and_a_label_word_are_read_out_of_an_answer() -> None:
    assert exact("2 + 3 = 5.\n#### 1,250", "so <<…>> #### 1250", "number") == 1.0
    assert exact("it is 12", "#### 13", "number") == 0.0
    assert exact("none", "nothing", "number") == 0.0  # no number is no answer
    assert exact(" Positive. Indeed", "positive", "word") == 1.0
    assert exact("In  Paris.", "in paris", "text") == 1.0


def test_adapters_of_a_language_model_stand_on_its_transformer(loaded: Loaded) -> None:
    backbone = loaded()
    assert backbone.prefix == "model."
    assert list(backbone.targets) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    states, _ = backbone.states(backbone.batch([[9, 10, 11]], [0]), {
        name: partial(Lora().delta, w=w) for name, w in modules(weights_of(backbone)).items()
    })  # fmt: skip
    assert states.shape == (1, 3, 16)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_stock_peft_gives_the_exported_adapters_logits_to_the_task_class(tmp_path: Path, loaded: Loaded) -> None:
    import peft

    for family in ("llama", "gpt2", "opt"):
        backbone = loaded(family)
        weights, folder = weights_of(backbone), tmp_path / family
        models(backbone, CausalLm()).export(folder, "c", weights)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert Path(config["base_model_name_or_path"]).is_absolute()
        ids = torch.tensor([[9, 10, 11, 30, 8]])
        with quiet(), torch.no_grad():
            base = t.AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]).eval()
            before = base(input_ids=ids).logits
            theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
            states, _ = backbone.states(backbone.batch(ids.tolist(), [0]), {
                name: partial(Lora().delta, w=w) for name, w in modules(weights).items()
            })  # fmt: skip
            assert backbone.head is not None
            torch.testing.assert_close(backbone.head.logits(states[0]), theirs[0], atol=1e-5, rtol=1e-5)
        assert (theirs - before).abs().max() > 1e-2  # it is no adapter that does nothing
        again, plain = load_export(folder)
        assert plain
        assert set(again) == set(weights)


@pytest.mark.parametrize(
    "template", ["chat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("auto", "alpaca"))]
)
def test_the_code_of_an_exports_readme_answers_as_celora_does(template: Any, tmp_path: Path, loaded: Loaded) -> None:
    backbone, task = loaded(max_length=200, begins=True), CausalLm(template=template, answer_tokens=7)
    weights = {name: 8 * weight for name, weight in weights_of(backbone).items()}
    models(backbone, task).export(tmp_path / "out", "c", weights)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert code is not None
    script = code[1] + "import json, sys\nassert 'celora' not in sys.modules\nprint(json.dumps(answers))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = models(backbone, task).answers("c", weights, ["a prompt", "and another one"])
    assert [text.strip() for text in json.loads(done.stdout)] == found
    assert all(found)


def test_many_prompts_are_answered_together_as_one_by_one(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = loaded(), CausalLm(answer_tokens=6)
    weights, prompts = weights_of(backbone), [f"{'ab' * n} {n}?" for n in (9, 1, 5, 30, 2)]
    alone = [models(backbone, task).answers("c", weights, [prompt])[0] for prompt in prompts]
    passes, plain = list[int](), Backbone.answers

    def counted(self: Backbone, ids: Any, *more: Any) -> list[str]:
        passes.append(len(ids))
        return plain(self, ids, *more)

    monkeypatch.setattr(Backbone, "answers", counted)
    assert models(backbone, task).answers("c", weights, prompts) == alone
    assert len(passes) < len(prompts)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_prompt_and_its_answer_stay_within_the_models_positions(family: str, loaded: Loaded) -> None:
    backbone = loaded(family, max_length=256)  # all that there are
    assert backbone.longest == 256
    prompt = [9 + at % 20 for at in range(256)]
    (found,) = backbone.answers([prompt], {}, 12)
    assert backbone.answers([prompt[-244:]], {}, 12) == [found]
    with pytest.raises(ModelError, match="expected at most 254"):
        models(backbone, CausalLm(answer_tokens=255))


def test_an_adapter_that_plain_lora_does_not_reproduce_is_not_exported(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lora, "lora", lambda self, w: (w["A"], 2 * w["B"]))
    with pytest.raises(
        ModelError, match=r"gives logits of .* that differ by .* from what was trained.* nothing is exported"
    ):
        models(loaded(), CausalLm()).export(tmp_path / "out", "c", weights_of(loaded()))
    assert not (tmp_path / "out").exists()


STORIES = Path(os.environ.get("CELORA_DATA") or Path(__file__).parents[3] / "shared" / "data") / "weights_stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"there is no {STORIES}: set CELORA_DATA to the folder that holds it")
def test_a_real_language_model_knows_how_stories_begin_and_go_on() -> None:
    backbone = load(
        Model(backbone=str(STORIES), max_length=128, device="cpu"), Adapter(rank=2, targets=("q_proj",)), STORIES,
        "causal-lm",
    )  # fmt: skip
    task = CausalLm(form="text")
    texts = [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
        "x q z 7 (",
    ]
    examples = task.read(data.Table(texts, [""] * 2, None, None, []), models(backbone, task))  # type: ignore[arg-type]
    forward = BatchedForward(AdaptedBackbone(backbone, Lora()), task)
    known, noise = (float(forward.losses({}, forward.batch(Rows(examples, range(2)), [row]))) for row in (0, 1))
    assert known < 1.5
    assert noise > 4
    (answer,) = backbone.answers(CausalLm().prompts(["Once upon a time, there was a"], backbone.text_tokenizer), {}, 20)
    assert answer.startswith("little girl named L")
