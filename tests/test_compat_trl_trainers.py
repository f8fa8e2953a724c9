"""compat.trl in the trainers of the installed TRL, on toy models built here."""

import os
import random

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from cases import error

from kd_kernels.compat import trl as compat

WHY = "trl, transformers, datasets and tokenizers are not installed (pip install kd-kernels[dropin])"
trl = pytest.importorskip("trl", reason=WHY)
datasets = pytest.importorskip("datasets", reason=WHY)
tokenizers = pytest.importorskip("tokenizers", reason=WHY)
import transformers  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

# --- trainers -----------------------------------------------------------------------------------------

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
STUDENTS = {
    "llama": lambda: transformers.LlamaConfig(hidden_size=16, tie_word_embeddings=False, **SMALL),
    "qwen2 tied": lambda: transformers.Qwen2Config(hidden_size=16, tie_word_embeddings=True, **SMALL),
    "gemma2 softcap": lambda: transformers.Gemma2Config(
        hidden_size=16, head_dim=8, final_logit_softcapping=3.0, **SMALL
    ),
    "granite scale": lambda: transformers.GraniteConfig(hidden_size=16, logits_scaling=2.5, **SMALL),
    "cohere scale": lambda: transformers.CohereConfig(hidden_size=16, logit_scale=0.4, **SMALL),
}


def model(config):
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(VOCAB - 5))]
    tool = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tool.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tool, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return fast


def conversations(rows=4):
    draw = random.Random(0)

    def say(n):
        return " ".join(f"w{draw.randrange(VOCAB - 5)}" for _ in range(n))

    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": say(3 + i)},
                    {"role": "assistant", "content": say(8 - i)},
                ]
            }
            for i in range(rows)
        ]
    )


def gkd_trainer(path, student="llama", cls=None, **options):
    torch.manual_seed(1)
    arguments = {
        "output_dir": str(path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2,
        "lmbda": 0.0, "beta": 0.3, "max_length": 64, "max_new_tokens": 5, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "optim": "sgd",
        "learning_rate": 0.05, "max_grad_norm": 0.0, "seed": 3, **options,
    }  # fmt: skip
    return (cls or GKDTrainer)(
        model=model(STUDENTS[student]()),
        teacher_model=model(transformers.LlamaConfig(hidden_size=24, **SMALL)),
        args=GKDConfig(**arguments),
        train_dataset=conversations(),
        eval_dataset=conversations(2),
        processing_class=tokenizer(),
    )


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def step(trainer, inputs, **options):
    """Loss and every parameter's gradient of one ``compute_loss``."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, {**inputs}, **options)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.requires_grad)]


def close(a, b, bar=2e-5):
    return len(a) == len(b) and all(error(x, y) < bar for x, y in zip(a, b))


def forbid_logits(*models):
    """Hooks that fail where an LM head gives logits."""

    def check(layer, _, output):
        if output.shape[-1] == VOCAB:
            pytest.fail("logits were computed")

    return [m.get_output_embeddings().register_forward_hook(check) for m in models]


def forbid_graph(*_):
    if torch.is_grad_enabled():
        pytest.fail("the teacher's forward keeps activations")


@pytest.mark.filterwarnings("ignore:.*the output layer has a forward hook")  # which only looks
@pytest.mark.parametrize("student", STUDENTS)
def test_gkd_step(student, tmp_path):
    """Loss and gradients equal the trainer's own dense path, and undo restores it."""
    trainer = gkd_trainer(tmp_path, student)
    inputs = first_batch(trainer)
    assert (inputs["labels"] == -100).any() and (inputs["labels"] != -100).any()
    for options in ({}, {"num_items_in_batch": torch.tensor(9)}):
        dense = step(trainer, inputs, **options)
        assert all(g.abs().sum() > 0 for g in dense)
        with compat.use_in_gkd(trainer):
            hooks = forbid_logits(trainer.model, trainer.teacher_model)
            hooks.append(trainer.teacher_model.register_forward_pre_hook(forbid_graph))
            ours = step(trainer, inputs, **options)
            for hook in hooks:
                hook.remove()
        assert close(ours, dense)
        assert "compute_loss" not in vars(trainer)
        assert all(torch.equal(a, b) for a, b in zip(step(trainer, inputs, **options), dense))


def test_gkd_beta_is_the_trainer_s(tmp_path):
    trainer = gkd_trainer(tmp_path)
    inputs = first_batch(trainer)
    losses = set()
    for trainer.beta in (0.0, 0.5, 1.0):
        dense = step(trainer, inputs)
        with compat.use_in_gkd(trainer):
            assert close(step(trainer, inputs), dense)
        losses.add(dense[0].item())
    assert len(losses) == 3


def test_gkd_on_policy_and_evaluation(tmp_path):
    """A whole ``training_step`` with ``generate`` in it, and ``evaluate``."""
    trainer = gkd_trainer(tmp_path, lmbda=1.0)
    trainer.current_gradient_accumulation_steps = 1  # train() would have set it
    inputs = first_batch(trainer)
    results = []
    for head in (False, True):
        handle = compat.use_in_gkd(trainer) if head else None
        random.seed(5)
        torch.manual_seed(5)
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, {**inputs}, None)
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        results.append([loss, *gradients, torch.tensor(trainer.evaluate()["eval_loss"])])
        if handle:
            handle.undo()
    assert close(*results)


def test_gkd_train_ends_at_the_same_weights(tmp_path):
    weights = []
    for head in (False, True):
        trainer = gkd_trainer(tmp_path, max_steps=3, gradient_accumulation_steps=2)
        start = [p.detach().clone() for p in trainer.model.parameters()]
        if head:
            compat.use_in_gkd(trainer)
        trainer.train()
        weights.append([p.detach() - q for p, q in zip(trainer.model.parameters(), start)])
    assert all(w.abs().sum() > 0 for w in weights[0])
    assert close(*weights, bar=1e-3)


def test_gkd_mixed_precision(tmp_path, monkeypatch):
    """accelerate's autocast lives in the model's forward; the head path enters it too."""
    exact = step(trainer := gkd_trainer(tmp_path / "exact"), inputs := first_batch(trainer))
    trainer = gkd_trainer(tmp_path / "mixed", bf16=True)
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    dense = step(trainer, inputs)
    heads, original = [], compat.generalized_jsd_loss
    monkeypatch.setattr(
        compat,
        "generalized_jsd_loss",
        lambda *args, **options: heads.append(torch.is_autocast_enabled("cpu")) or original(*args, **options),
    )
    with compat.use_in_gkd(trainer):
        ours = step(trainer, inputs)
    assert not close(dense, exact, bar=1e-4), "autocast was not on"
    assert not close(ours, exact, bar=1e-4) and heads == [True], "the head path left autocast"
    for a, b, c in zip(ours, dense, exact):
        assert error(a, c) <= 2 * error(b, c) + 4e-3


def test_gkd_gives_outputs_where_they_are_asked_for(tmp_path):
    trainer = gkd_trainer(tmp_path)
    inputs = first_batch(trainer)
    with compat.use_in_gkd(trainer):
        loss, outputs = trainer.compute_loss(trainer.model, {**inputs}, return_outputs=True)
    assert outputs.logits.shape[-1] == VOCAB
    assert error(loss, trainer.compute_loss(trainer.model, {**inputs})) == 0


def test_gkd_class_and_subclass(tmp_path):
    class Mine(GKDTrainer):
        pass

    own = GKDTrainer.compute_loss
    trainer = gkd_trainer(tmp_path, cls=Mine)
    inputs = first_batch(trainer)
    dense = step(trainer, inputs)
    for cls in (GKDTrainer, Mine):
        handle = compat.use_in_gkd(cls)
        assert cls.compute_loss is not own
        assert close(step(trainer, inputs), dense)
        for target in (trainer, cls):
            with pytest.raises(ValueError, match="already takes the head path"):
                compat.use_in_gkd(target)
        handle.undo()
        handle.undo()
        assert cls.compute_loss is own and "compute_loss" not in vars(Mine)


def test_gkd_under_ddp(tmp_path):
    """One process: the loss goes through DDP's forward, so that its gradient reduction notices."""

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer = gkd_trainer(tmp_path)
        inputs = first_batch(trainer)
        dense = step(trainer, inputs)
        wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model, find_unused_parameters=True)
        calls = []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        with compat.use_in_gkd(trainer):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(wrapped, {**inputs})
            loss.backward()
        assert calls == [1]
        assert close([loss.detach(), *(p.grad for p in trainer.model.parameters())], dense)
    finally:
        torch.distributed.destroy_process_group()


def test_distillation_trainer(tmp_path):
    torch.manual_seed(1)
    prompts = [{"prompt": [{"role": "user", "content": "w1 w2"}]} for _ in range(4)]
    trainer = trl.DistillationTrainer(
        model=model(STUDENTS["granite scale"]()),
        teacher_model=model(transformers.LlamaConfig(hidden_size=24, **SMALL)),
        args=trl.DistillationConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, beta=0.3, temperature=1.5,
            per_device_train_batch_size=2, max_completion_length=5,
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer(),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.randint(2, VOCAB, (2, 4)),
        "completion_ids": torch.randint(2, VOCAB, (2, 6)),
        "prompt_mask": torch.ones(2, 4, dtype=torch.int64),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "num_items_in_batch": torch.tensor(11.0),
    }
    own = trl.DistillationTrainer._compute_loss
    dense = step(trainer, inputs)
    with compat.use_in_distillation(trainer):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distillation_trainer, "ChunkedDivergenceFunction", None)
            ours = step(trainer, inputs)
        with pytest.raises(ValueError, match="already takes the head path"):
            compat.use_in_distillation(trainer)
    a, b = trainer._metrics["train"]["entropy"]
    assert close(ours, dense) and abs(a - b) < 1e-5
    with compat.use_in_distillation(trl.DistillationTrainer):
        assert trl.DistillationTrainer._compute_loss is not own
        assert close(step(trainer, inputs), dense)
    assert trl.DistillationTrainer._compute_loss is own
    assert all(torch.equal(x, y) for x, y in zip(step(trainer, inputs), dense))


# --- PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["q_proj", "lm_head"])
def test_gkd_lora(where, tmp_path):
    """Below the head and on it, where the head's own weight is not what gives the logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install kd-kernels[dropin])")
    trainer = gkd_trainer(tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=[where], init_lora_weights=False)
    trainer.model = peft.get_peft_model(trainer.model, lora)
    inputs = first_batch(trainer)
    dense = step(trainer, inputs)
    assert len(dense) == 1 + (4 if where == "q_proj" else 2)
    with compat.use_in_gkd(trainer):
        assert close(step(trainer, inputs), dense)


def test_gkd_prompt_learning(tmp_path):
    """Its virtual tokens have no labels: TRL fails on the shapes, and so does the head path, by name."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install kd-kernels[dropin])")
    trainer = gkd_trainer(tmp_path)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer.model = peft.get_peft_model(trainer.model, prompts)
    inputs = first_batch(trainer)
    with compat.use_in_gkd(trainer), pytest.raises(ValueError, match="must have the same tokens"):
        trainer.compute_loss(trainer.model, {**inputs})


# --- refusals -----------------------------------------------------------------------------------------


def test_unknown_release_is_refused(monkeypatch):
    assert trl.__version__.startswith(compat.KNOWN_TRL), "record it in KNOWN_TRL once these tests pass"
    for version in ("1.15.2", "1.17.0", "2.0.0", "1.160.0"):
        monkeypatch.setattr(trl, "__version__", version)
        for use, target in (
            (compat.use_in_gkd, GKDTrainer),
            (compat.use_in_distillation, trl.DistillationTrainer),
        ):
            with pytest.raises(ValueError, match=f"{use.__name__} knows trl 1.16; installed is {version}"):
                use(target)


def test_other_trainers_are_refused():
    class OwnLoss(GKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.zeros(())

    class OwnDivergence(GKDTrainer):
        generalized_jsd_loss = staticmethod(lambda *_, **__: torch.zeros(()))

    for target, words in (
        (trl.SFTTrainer, "must be a trl GKDTrainer, got SFTTrainer"),
        (object(), "must be a trl GKDTrainer, got object"),
        (OwnLoss, "OwnLoss.compute_loss is not that of GKDTrainer"),
        (OwnDivergence, "OwnDivergence.generalized_jsd_loss is not that of GKDTrainer"),
    ):
        with pytest.raises(TypeError, match=words):
            compat.use_in_gkd(target)
    with pytest.raises(TypeError, match="must be a trl DistillationTrainer, got GKDTrainer"):
        compat.use_in_distillation(GKDTrainer)

    class Elsewhere(trl.DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return torch.zeros(())

    with pytest.raises(TypeError, match="Elsewhere.compute_loss is not that of DistillationTrainer"):
        compat.use_in_distillation(Elsewhere)


def test_a_student_that_is_its_own_teacher_keeps_its_dropout(tmp_path):
    """TRL puts the teacher into evaluation after the student's forward."""
    trainer = gkd_trainer(tmp_path, disable_dropout=False)
    trainer.model.config.attention_dropout = 0.3
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    trainer.teacher_model = trainer.model
    inputs = first_batch(trainer)

    def loss():
        trainer.model.train()
        torch.manual_seed(1)
        return trainer.compute_loss(trainer.model, dict(inputs)).item()

    dense = loss()
    with compat.use_in_gkd(trainer):
        assert dense > 1e-3 and loss() == pytest.approx(dense, rel=1e-5)


def test_models_that_are_not_covered_are_refused(tmp_path):
    trainer = gkd_trainer(tmp_path)
    inputs = first_batch(trainer)
    with compat.use_in_gkd(trainer):
        with pytest.raises(ValueError, match="compiled as a whole"):
            trainer.compute_loss(torch.compile(trainer.model, backend="eager"), {**inputs})
        trainer.model.config.logits_scale = 0.5  # nothing that a Llama does
        with pytest.raises(ValueError, match="logits_scale=0.5, which may shape its logits"):
            trainer.compute_loss(trainer.model, {**inputs})


def test_undo_does_not_throw_away_what_was_put_over_it():
    original = GKDTrainer.compute_loss
    handle = compat.use_in_gkd(GKDTrainer)
    ours = GKDTrainer.compute_loss
    GKDTrainer.compute_loss = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="replaced again since"):
        handle.undo()
    GKDTrainer.compute_loss = ours
    handle.undo()
    assert GKDTrainer.compute_loss is original
