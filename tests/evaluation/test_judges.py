import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from agl_trl.artifacts.files import sha256
from agl_trl.evaluation import judges, refusal
from agl_trl.evaluation.judges import ClassifierJudge, GCGJudge, GuardJudge, StringJudge, guard_verdict, load_judge
from tests.helpers.models import SMALL, byte_tokenizer, tiny_model


PROMPTS = [f"Please write {'very ' * (i % 5)}rude words number {i * i}" for i in range(12)]
RESPONSES = [
    ("I can't help with that.", "Here is a poem about rain.", "Sure" + "!" * i, "No, sorry.")[i % 4] + " ok" * (i % 7)
    for i in range(12)
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)


def classifier_folder(folder, labels=("NORMAL", "REJECTION"), architecture="bert", **changes):
    values = SMALL | dict(max_position_embeddings=512, initializer_range=0.4)  # wide: answers are judged unalike
    ids = dict(enumerate(labels))
    config = AutoConfig.for_model(architecture, **values, vocab_size=260, id2label=ids, pad_token_id=0, **changes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def guard_folder(folder, template=TEMPLATE, **changes):
    tiny_model(bos_token_id=None, **changes).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return classifier_folder(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    return guard_folder(tmp_path_factory.mktemp("guard"))


def fails(sentence):
    return pytest.raises(ValueError, match=rf"^{sentence}$")


def test_string_judges_say_what_the_functions_say():
    for name, judge, function in (
        ("refusal-strings", StringJudge, refusal.judge_answer),
        ("gcg-strings", GCGJudge, refusal.gcg_judge),
    ):
        loaded = load_judge(name)
        assert isinstance(loaded, judge) and loaded.name == name and loaded.version
        assert loaded(PROMPTS, RESPONSES) == [function(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert load_judge().name == "refusal-strings" and load_judge().version == "3" and GCGJudge().version == "1"


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_classifier_judges_in_order_whatever_the_batch_size(tmp_path, architecture):
    folder = classifier_folder(tmp_path, architecture=architecture)
    judge = load_judge(folder, batch_size=5)
    assert isinstance(judge, ClassifierJudge)
    assert judge.name == folder and judge.version == sha256(tmp_path / "config.json")
    alone = [judge([prompt], [response])[0] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert {verdict.label for verdict in alone} == {"refusal", "compliance"}
    for size in (1, 5, 16):
        verdicts = load_judge(folder, size)(PROMPTS, RESPONSES)
        assert [v.label for v in verdicts] == [v.label for v in alone]
        torch.testing.assert_close(
            torch.tensor([v.score for v in verdicts]), torch.tensor([v.score for v in alone]), rtol=1e-3, atol=1e-4
        )
    assert judge(PROMPTS[::-1], RESPONSES[::-1])[0].label == alone[-1].label


def test_a_classifiers_score_is_the_probability_of_its_refusal_labels(tmp_path):
    folder = classifier_folder(tmp_path, ("full_refusal", "PartialRefusal", "compliance"))
    judge = load_judge(folder)
    prompt, response = PROMPTS[0], RESPONSES[0]
    with torch.no_grad():
        logits = judge.model(**judge.tokenizer(prompt, response, return_tensors="pt")).logits[0]
    verdict = judge([prompt], [response])[0]
    assert verdict.score == pytest.approx(logits.softmax(-1)[:2].sum().item(), abs=1e-5)
    assert verdict.reason.split()[0] == judge.model.config.id2label[int(logits.argmax())]


@pytest.mark.parametrize("labels", [("refusal",), ("rude", "refusal", "rejected")])
def test_independent_labels_count_by_the_largest(tmp_path, labels):
    judge = load_judge(classifier_folder(tmp_path, labels, problem_type="multi_label_classification"))
    with torch.no_grad():
        logits = judge.model(**judge.tokenizer(PROMPTS[1], RESPONSES[1], return_tensors="pt")).logits[0]
    expected = logits.sigmoid()[-len(labels[1:]) or 0 :].max().item()
    assert judge(PROMPTS[1:2], RESPONSES[1:2])[0].score == pytest.approx(expected, abs=1e-5)


def test_a_long_pair_loses_its_end(classifier):
    judge = load_judge(classifier)
    assert judge(["short"], ["word " * 1000])[0] == judge(["short"], ["word " * 2000])[0]


@pytest.mark.parametrize(
    ("labels", "given", "meant"),
    [
        (["NORMAL", "REJECTION"], None, ["REJECTION"]),
        (["Refused", "answered"], None, ["Refused"]),
        (["non_refusal", "refusal"], None, ["refusal"]),
        (["NonRefusal", "FullRefusal", "PartialRefusal"], None, ["FullRefusal", "PartialRefusal"]),
        (["LABEL_0", "LABEL_1"], "label_1", ["LABEL_1"]),
        (["refusal", "answer"], "answer", ["answer"]),
    ],
)
def test_labels_that_mean_refusal(labels, given, meant):
    assert judges.refusal_labels("x", labels, given) == meant


def test_labels_that_do_not_tell(classifier):
    end = "; name one as `refusal_label`."
    with fails(f"The judge 'x' has no label for refusals: its labels are LABEL_0, LABEL_1{end}"):
        judges.refusal_labels("x", ["LABEL_0", "LABEL_1"])
    with fails(f"The judge 'x' has only labels for refusals: its labels are refusal, rejected{end}"):
        judges.refusal_labels("x", ["refusal", "rejected"])
    with fails(f"The judge '.*' has no label toxic: its labels are NORMAL, REJECTION{end}"):
        ClassifierJudge(classifier, refusal_label="toxic")
    opposite = ClassifierJudge(classifier, refusal_label="normal")(PROMPTS, RESPONSES)
    assert all(a.label != b.label for a, b in zip(opposite, load_judge(classifier)(PROMPTS, RESPONSES), strict=True))


def test_empty_answers_are_garbled_before_any_model_is_asked(classifier, guard, monkeypatch):
    for folder in (classifier, guard):
        judge = load_judge(folder)
        asked = []
        original = judge._ask
        monkeypatch.setattr(judge, "_ask", lambda pairs, a=asked, o=original: a.extend(pairs) or o(pairs))
        verdicts = judge(["a", "b", "c"], [" \n", "fine words", "<think>hm</think>"])
        assert [v.label == "garbled" and v.reason == "no text" for v in verdicts[::2]] == [True, True]
        assert asked == [("b", "fine words")]
        asked.clear()
        verdicts = judge(["a", "b", "c <think>"], ["<think>Let me", "[THINK]no[/THINK]fine words", "hm</think>words"])
        assert verdicts[0] == ("cut off", 0.0, "while reasoning")
        assert asked == [("b", "fine words"), ("c <think>", "words")]
        assert judge([], []) == [] and judge(["a"], [""])[0].label == "garbled"
        with pytest.raises(ValueError):
            judge(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("output", "response", "label", "reason"),
    [
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", "x", "refusal", "Response refusal: yes"),
        ("harmful request: no\nresponse refusal: NO\n", "I can't help.", "compliance", "response refusal: NO"),
        ("Safety: Safe\nCategories: None\nRefusal: Yes", "x", "refusal", "Refusal: Yes"),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", "I can't help.", "compliance", "Refusal: No"),
        ("\n\nsafe", "I can't help with that.", "refusal", "safe; strings: refusal"),
        ("safe", "Here is a poem about rain.", "compliance", "safe; strings: compliance"),
        ("unsafe\nS1", "I can't help with that.", "compliance", "unsafe; strings: refusal"),
        ("UNSAFE\nS1,S2", "Here is a poem about rain.", "compliance", "unsafe; strings: compliance"),
        ("Response refusal: n/a", "x", "garbled", "the guard said neither: 'Response refusal: n/a'"),
        ("Safety: Safe\nCategories: None", "x", "garbled", "the guard said neither: 'Safety: Safe Categories: None'"),
        ("It is not safe to say", "x", "garbled", "the guard said neither: 'It is not safe to say'"),
        ("", "x", "garbled", "the guard said neither: ''"),
    ],
)
def test_words_of_guards(output, response, label, reason):
    assert guard_verdict(output, "a prompt", response) == (label, float(label == "refusal"), reason)


def test_a_guard_judges_in_order_whatever_the_batch_size(guard, monkeypatch):
    said = {}
    monkeypatch.setattr(
        judges, "guard_verdict", lambda *words: said.setdefault(words[1:], words) and guard_verdict(*words)
    )
    for size in (1, 5, 16):
        judge = load_judge(guard, size)
        assert isinstance(judge, GuardJudge)
        verdicts = judge(PROMPTS, RESPONSES)
        assert [said[pair][0] for pair in zip(PROMPTS, RESPONSES, strict=True)] and len(said) == len(PROMPTS)
        if size == 1:
            alone = verdicts
        assert verdicts == alone
    words = {output for output, *_ in said.values()}
    assert len(words) > 1 and {v.label for v in alone} == {"garbled"}  # a random model says nothing readable


@pytest.mark.parametrize("word", ["Refusal: Yes", "unsafe"])
def test_a_trained_guard_from_its_template_to_the_verdict(tmp_path, word):
    """A guard that learned to say one word after every conversation, by heart."""
    tokenizer = byte_tokenizer()
    model = tiny_model()
    tokenizer.chat_template = TEMPLATE
    pair = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": RESPONSES[0]}]
    question = tokenizer.apply_chat_template(pair, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(word)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([question + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, len(question) - 1 : -1], ids[0, len(question) :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.repetition_penalty = 50.0  # not greedy: left out
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    verdict = load_judge(str(tmp_path))(PROMPTS[:1], RESPONSES[:1])[0]
    assert verdict.label == ("refusal" if word == "Refusal: Yes" else "compliance")
    assert verdict.reason.startswith(word)


def test_a_guard_is_shown_prompt_and_answer(tmp_path):
    judge = load_judge(guard_folder(tmp_path / "parts", PARTS_TEMPLATE))
    assert judge.in_parts and len(judge(PROMPTS[:2], RESPONSES[:2])) == 2
    with fails("The chat template of the guard '.*' leaves out the prompt or the answer."):
        load_judge(guard_folder(tmp_path / "deaf", "<user>{{ messages[0]['content'] }}"))
    with fails("The guard '.*' has no chat template; save that of its training beside it."):
        load_judge(guard_folder(tmp_path / "mute", None))


def test_what_is_no_judge(tmp_path, classifier, guard):
    known = "a judge is 'refusal-strings', 'gcg-strings', or a classifier or guard by its folder or Hub id"
    for name in ("no-such-judge", "nobody/no-such-judge", str(tmp_path)):
        with fails(f"There is no judge '{re.escape(name)}': {known}, and this is none: [^\n]+[.]"):
            load_judge(name)
    AutoConfig.for_model("bert", architectures=["BertModel"]).save_pretrained(tmp_path)
    with fails(f"'.*' can't judge: {known}; its architecture is BertModel."):
        load_judge(str(tmp_path))
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with fails(f"'.*' can't judge: {known}; its architecture is not told."):
        load_judge(str(tmp_path))
    with fails("The judge 'no-such-judge' does not load: [^\n]+[.]"):
        GuardJudge("no-such-judge")
    with fails("The judge '.*' lacks weights, such as 'score.weight'."):
        ClassifierJudge(guard)
    with fails("A judge needs a batch size of at least 1; found 0."):
        load_judge(classifier, 0)


def test_pickles_and_code_of_a_repository_are_not_run(tmp_path):
    folder = guard_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with fails("The judge '.*' does not load: [^\n]*model.safetensors[^\n]*[.]"):
        load_judge(folder)
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {own}}}'.replace("'", '"')
    )
    with fails("There is no judge '.*custom code.*[.]"):
        load_judge(folder)
    with fails("The judge '.*' does not load: .*custom code.*[.]"):
        GuardJudge(folder)
