"""The loss is that of transformers and torch; neither all logits nor their gradient exist where a model allows it."""

import types
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from scale_sft.model import cross_entropy, loss, output_layer
from scale_sft.model.loss import IGNORED
from scale_sft.model.output_layer import OutputLayer
from scale_sft.planning.meta_trace import LiveBytes
from scale_sft.spiel.taps import WeightTap, attach, detach

VOCABULARY = 37


class Fixed(nn.Module):
    """A model whose logits are a parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.logits * 1)


@pytest.fixture
def batch():
    labels = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3], labels[1] = IGNORED, IGNORED
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def logits(dtype):
    return (8 * torch.randn(3, 7, VOCABULARY, generator=torch.Generator().manual_seed(1))).to(dtype)


def of_torch(model, batch):
    following = batch["labels"][:, 1:]
    picked = model(batch["input_ids"], use_cache=False).logits[:, :-1][following != IGNORED]
    return functional.cross_entropy(picked.float(), following[following != IGNORED], reduction="none")


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, cross_entropy.CPU_LOGITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_those_of_torch_and_gradients_too(dtype, at_once, batch, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", at_once)
    ours, theirs = Fixed(logits(dtype)), Fixed(logits(dtype))
    found, expected = loss.token_losses(ours, batch), of_torch(theirs, batch)
    assert torch.equal(found, expected) and found.dtype is torch.float32
    weights = torch.linspace(-1, 2, len(found))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.logits.grad.dtype is dtype
    torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert not ours.logits.grad[1].any() and not ours.logits.grad[:, -1].any()  # what predicts no target


def test_a_batch_without_targets_costs_and_teaches_nothing(batch):
    model = Fixed(logits(torch.bfloat16))
    batch["labels"][:] = IGNORED
    total = loss.token_loss_sum(model, batch)
    total.backward()
    assert total == 0 and not model.logits.grad.any()


def test_beside_the_logits_lie_their_gradient_and_a_few_rows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 4 * 1000)
    rows = torch.zeros(256, 1000, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes(nn.Module()) as count:
        cross_entropy.cross_entropies(rows, torch.arange(256), torch.zeros(256, dtype=torch.int64)).sum().backward()
    few_rows = 4 * 4000 * (4 + 4 + 2)  # numbers in fp32, made and kept by an operation or two
    assert rows.nbytes < count.peak < rows.nbytes + few_rows < 1.5 * rows.nbytes


# --- through the output layer -----------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2, tied": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gpt2, tied": lambda: GPT2Config(**GPT2, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt, narrow": lambda: OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=8, dropout=0.0),
    "phi, with a bias": lambda: PhiConfig(**SMALL),
    "gemma2, capped": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.5),
    "cohere, scaled": lambda: CohereConfig(**SMALL, logit_scale=0.3),
    "granite, divided": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
}


def made(config, dtype=torch.float32):
    """A frozen model with logits that differ by much, and a list that gets the output of its embeddings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).train()
    model.get_output_embeddings().weight.mul_(50)
    if (bias := model.get_output_embeddings().bias) is not None:
        bias.uniform_(-3, 3)
    embedded = []

    def keep(module, arguments, output):
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    model.get_input_embeddings().register_forward_hook(keep)
    return model, embedded


def gradient_of(value, embedded):
    value.backward()
    return embedded[-1].grad


def no_whole_logits(monkeypatch):
    """From now on the path over whole logits is an error."""
    monkeypatch.setattr(loss, "cross_entropies", None)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradient_are_those_of_transformers(name, rows, batch, monkeypatch):
    monkeypatch.setattr(output_layer, "CPU_CHUNK", rows * VOCABULARY)
    no_whole_logits(monkeypatch)
    model, embedded = made(CONFIGS[name]())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    targets = int((batch["labels"][:, 1:] != IGNORED).sum())
    found = loss.token_loss_sum(model, batch, targets)
    of_ours = gradient_of(found, embedded)
    expected = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_ours, gradient_of(expected, embedded), rtol=1e-4, atol=1e-6)
    assert loss.why_all_logits(model) is None and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2, capped"])
def test_any_weighting_of_the_losses_has_its_gradient_whatever_divisor_was_announced(name, dtype, batch, monkeypatch):
    monkeypatch.setattr(output_layer, "CPU_CHUNK", 3 * VOCABULARY)
    model, embedded = made(CONFIGS[name](), dtype)
    weights = torch.linspace(-1, 2, int((batch["labels"][:, 1:] != IGNORED).sum()))
    expected = of_torch(model, batch)
    wanted = gradient_of((expected * weights).sum(), embedded)
    for over in (1, 7):
        found = loss.token_losses(model, batch, over)
        few = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=few, atol=few * 10)
        got = gradient_of((found * weights).sum(), embedded)
        torch.testing.assert_close(got, wanted, rtol=0, atol=float(4 * few * wanted.abs().max()))


def test_without_gradients_only_the_losses_are_formed(batch, monkeypatch):
    no_whole_logits(monkeypatch)
    model, _ = made(CONFIGS["llama"]())
    with torch.no_grad():
        found = loss.token_losses(model, batch)
        assert not found.requires_grad
        torch.testing.assert_close(found, of_torch(model, batch))


def test_tokens_without_a_target_never_reach_the_output_layer(batch, monkeypatch):
    no_whole_logits(monkeypatch)
    model, embedded = made(CONFIGS["llama"]())
    assert isinstance(output_layer.output_layer(model), OutputLayer)
    head, rows = model.get_output_embeddings(), []
    plain = head.forward
    head.forward = lambda hidden: rows.append(hidden.shape[:-1].numel()) or plain(hidden)
    batch["labels"][:, 4:] = IGNORED
    found = loss.token_losses(model, batch)
    assert sum(rows) == len(found) == int((batch["labels"][:, 1:] != IGNORED).sum()) < 10
    batch["labels"][:] = IGNORED
    nothing = loss.token_loss_sum(model, batch)
    assert nothing == 0 and sum(rows) == len(found) and not gradient_of(nothing, embedded).any()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_the_hidden_states_is_their_gradient_and_one_chunk(dtype, trained, monkeypatch):
    """At the chunk of a GPU, 8,192 tokens of 4,096 numbers and a vocabulary of 128k: below 1.1 GB."""
    bound = lambda tokens, width, chunk, rows: (2 * chunk + 3 * tokens * width) * dtype.itemsize + rows * 4 * 3
    assert bound(8192, 4096, output_layer.GPU_CHUNK, cross_entropy.GPU_LOGITS) < 1.1e9
    vocabulary, tokens, chunk, piece = 4000, 512, 16 * 4000, 4 * 4000
    monkeypatch.setattr(output_layer, "CPU_CHUNK", chunk)
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", piece)
    head = nn.Linear(16, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    layer = OutputLayer(head, lambda logits: logits, vocabulary)
    if trained:
        attach(WeightTap(head, "w", lambda *_, more=False: None))
    with LiveBytes(head) as count:
        layer._losses(head.forward, hidden, torch.arange(tokens), torch.arange(tokens), 7).sum().backward()
    small = 64 * tokens  # places, targets, losses
    assert chunk * dtype.itemsize < count.peak < bound(tokens, 16, chunk, piece) + small < tokens * vocabulary


def test_a_layer_that_autograd_trains_gets_all_logits(batch):
    model, _ = made(CONFIGS["llama"]())
    assert loss.why_all_logits(model) is None
    model.get_output_embeddings().weight.requires_grad_(True)
    assert "is trained" in loss.why_all_logits(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2, tied", "gemma2, capped", "cohere, scaled"])
@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, output_layer.CPU_CHUNK])
def test_a_trained_output_layer_gets_its_gradient_in_chunks(kind, chunk, batch, monkeypatch):
    """And the hidden states theirs, whatever the caller weighs the losses by."""
    model, embedded = made(CONFIGS[kind]())
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied
    weights = torch.linspace(-1, 2, int((batch["labels"][:, 1:] != IGNORED).sum()))
    expected = of_torch(model, batch)
    wanted = torch.autograd.grad((expected * weights).sum(), [head.weight, embedded[-1]])
    no_whole_logits(monkeypatch)
    monkeypatch.setattr(output_layer, "CPU_CHUNK", chunk)
    head.weight.requires_grad_(False)
    recorded = []
    attach(WeightTap(head, "w", lambda name, left, right, more=False: recorded.append((left.t() @ right, more))))
    assert loss.why_all_logits(model) is None
    found = loss.token_losses(model, batch)
    torch.testing.assert_close(found, expected.detach())
    (of_hidden,) = torch.autograd.grad((found * weights).sum(), embedded[-1])
    torch.testing.assert_close(of_hidden, wanted[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(part for part, _ in recorded), wanted[0], rtol=1e-4, atol=1e-6)
    assert [more for _, more in recorded] == [True] * (len(recorded) - 1) + [False]
    assert len(recorded) == {1: len(weights), 2 * VOCABULARY: -(-len(weights) // 2)}.get(chunk, 1)
    batch["labels"][:] = IGNORED  # ranks meet when candidates are proposed: one without targets must come too
    recorded.clear()
    loss.token_losses(model, batch).sum().backward()
    assert len(recorded) == 1 and not recorded[0][0].any()


def test_a_tap_that_only_adds_a_delta_is_gone_through(batch, monkeypatch):
    no_whole_logits(monkeypatch)
    model, embedded = made(CONFIGS["llama"]())
    head = model.get_output_embeddings()
    changed = head.weight * 0.5
    attach(WeightTap(head, "lm_head.weight", None, effective_weight=lambda: changed))
    found = loss.token_loss_sum(model, batch)
    of_ours = gradient_of(found, embedded)
    detach(head)
    head.weight.copy_(changed)
    expected = of_torch(model, batch).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_ours, gradient_of(expected, embedded), rtol=1e-4, atol=1e-6)


def squared(logits):
    return logits * logits.abs()


def capped(logits):
    return 50 * torch.tanh(logits / 50)  # nearly nothing, near zero


def cut(logits):
    return logits[..., :-1]


def forbidden(logits):
    logits[..., 3] = -1e4
    return logits


@pytest.mark.parametrize("change", [squared, capped, cut, forbidden])
def test_a_model_that_does_more_to_its_logits_than_is_known_has_them_all(change, batch):
    model, embedded = made(CONFIGS["llama"]())
    plain = model.forward

    def forward(self, *arguments, **inputs):
        output = plain(*arguments, **inputs)
        output.logits = change(output.logits)
        return output

    model.forward = MethodType(forward, model)
    batch["labels"][batch["labels"] == VOCABULARY - 1] = 0
    assert "LlamaForCausalLM" in loss.why_all_logits(model)
    found = loss.token_loss_sum(model, batch)
    of_ours = gradient_of(found, embedded)
    expected = of_torch(model, batch).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_ours, gradient_of(expected, embedded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [0, 2])
def test_a_model_that_calls_its_output_layer_otherwise_than_once_has_all_logits(times, batch):
    model, _ = made(CONFIGS["llama"]())
    head = model.lm_head

    class Head(nn.Module):
        def forward(self, hidden):
            return sum(head(hidden) for _ in range(times)) if times else hidden @ head.weight.t()

    model.lm_head = Head()
    model.get_output_embeddings = lambda: head
    assert f"calls its output layer {times} times" in loss.why_all_logits(model)
    torch.testing.assert_close(loss.token_losses(model, batch), of_torch(model, batch))


def test_a_new_output_layer_is_proven_again(batch, monkeypatch):
    no_whole_logits(monkeypatch)
    model, _ = made(CONFIGS["llama"]())
    before = loss.token_losses(model, batch)
    model.lm_head = nn.Linear(16, VOCABULARY).requires_grad_(False)
    found = loss.token_losses(model, batch)
    torch.testing.assert_close(found, of_torch(model, batch))
    assert not torch.allclose(found, before)


def test_a_pass_that_fails_leaves_the_model_as_it_was(batch):
    model, _ = made(CONFIGS["llama"]())
    assert loss.why_all_logits(model) is None
    with pytest.raises(IndexError):
        loss.token_losses(model, {**batch, "input_ids": batch["input_ids"] + VOCABULARY})
    assert "forward" not in vars(model.lm_head)
    assert model(batch["input_ids"]).logits.shape[-1] == VOCABULARY


def test_the_probe_takes_no_random_numbers_though_training_does(batch):
    model, _ = made(GPT2Config(**GPT2, eos_token_id=2))  # with dropout
    state = torch.get_rng_state()
    assert loss.why_all_logits(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    loss.token_losses(model, batch)
    assert not torch.equal(torch.get_rng_state(), state)
