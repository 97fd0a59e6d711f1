"""Load a decoder-only Hugging Face language model, only as deep as its residual stream is read."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from chatsae import console
from chatsae.batch import Message, TokenBatch
from chatsae.config import ModelConfig
from chatsae.data.template import SkippedError, chat_template, messages_of
from chatsae.errors import UserError
from chatsae.files import shared_name
from chatsae.lm import checkpoint, placement, stacks
from chatsae.lm.checkpoint import ModelFacts, demo_model_path, load_tokenizer, model_facts
from chatsae.lm.harvest import Harvest, relative_error
from chatsae.lm.hf import LOAD_ERRORS, one_line, quiet
from chatsae.lm.placement import pick_device, pick_placement
from chatsae.lm.random_weights import randomise_
from chatsae.lm.tap import check_blocks, text_problem

__all__ = ["LanguageModel", "ModelFacts", "demo_model_path", "load_tokenizer", "model_facts", "pick_device"]


class LanguageModel:
    """A decoder-only language model whose residual stream is read after `layers`; the text part of a multimodal one.

    Only the blocks up to the deepest of `layers` are read from disk, without the head and without the towers of other
    modalities; with `head=True`, or without layers, all blocks and the head. Weights are frozen. Layer L means the
    residual stream after block L (`hook_resid_post`), before the final norm.

    Attributes: name, label (its `shared_name`), random_weights, layers (sorted), n_layers and d_in of the whole model,
    vocab_size, max_positions, rope_split (sequences longer than this must not share a forward with shorter ones),
    device (where token ids go and activations come), dtype, head, cut (later blocks were left out), and the modules
    model, decoder (the model without its head) and blocks.
    """

    def __init__(
        self,
        name: str | Path,
        layers: Sequence[int] = (),
        *,
        dtype: str = "auto",
        device: str | torch.device = "auto",
        device_map: str | None = None,
        quantization: str = "checkpoint",
        layer_path: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        random_weights: int | None = None,
        head: bool = False,
    ) -> None:
        """Load it; `device_map` spreads the blocks over all GPUs, `quantization` is one of `Placement`'s.

        `chat_template`: the name of one, where the tokenizer has several. `random_weights`: a seed of random weights in
        place of its own (`chatsae.lm.random_weights`).

        Raises:
            UserError: the model is unknown or no decoder-only language model, a layer is out of range or asked for
                twice, a weight file is missing, truncated or corrupt, or the model cannot be placed as asked.
        """
        self._placement = pick_placement(device, dtype, device_map, quantization)
        self.device, self.dtype = self._placement.device, self._placement.dtype
        self._layer_path, self._chat_template = layer_path, chat_template
        self._source = checkpoint.locate(name, revision, trust_remote_code)
        config = checkpoint.read_config(self._source)
        text = stacks.text_config(config)
        self.name, self.label, self.random_weights = str(name), shared_name(str(name)), random_weights
        self.n_layers = stacks.count_blocks(config, layer_path)
        self.layers = _check_layers(layers, self.n_layers, self.name)
        self.head = head or not self.layers
        self.d_in: int = text.hidden_size
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self.rope_split = _rope_split(text)
        checkpoint.check_shards(self._source)
        self._full: LanguageModel | None = None
        self._adopt(self._load(config))
        if random_weights is not None:
            randomise_(self.model, self.decoder, self.blocks, random_weights, self.name)
        embedding = self.model.get_input_embeddings().weight
        self.vocab_size: int = embedding.shape[0]
        self.device = embedding.device
        self._probe()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, read at first use."""
        return checkpoint.read_tokenizer(self._source, self._chat_template, self.max_positions)

    def with_head(self) -> "LanguageModel":
        """The whole model with its head, loaded at first use; from then on both hold one copy of the weights."""
        if self.head:
            return self
        if self._full is None:
            self._full = LanguageModel(
                self.name,
                self.layers,
                dtype=str(self.dtype).removeprefix("torch."),
                device="auto" if self._placement.device_map else self.device,
                device_map=self._placement.device_map,
                quantization=self._placement.quantization,
                layer_path=self._layer_path,
                revision=self._source.revision,
                trust_remote_code=self._source.trust_remote_code,
                chat_template=self._chat_template,
                random_weights=self.random_weights,
                head=True,
            )
            self._adopt(self._full.model)
        return self._full

    def harvest(self, tokens: Iterable[TokenBatch], **options: Any) -> Harvest:
        """The activations of `tokens`, batch by batch; `options` are those of `Harvest`."""
        return Harvest(self, tokens, **options)

    def check_width(self, sae: str, d_in: int) -> None:
        """Refuse an SAE of another width than this model's residual stream.

        Raises:
            UserError: it is one.
        """
        if d_in != self.d_in:
            raise UserError(
                f"{sae}: d_in is {d_in}, the residual stream of {self.name} has {self.d_in}; "
                "is it an SAE of another model?"
            )

    def chat(self, prompt: str | Sequence[Message | Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The model's greedy answer to a prompt or to a list of messages.

        Raises:
            UserError: the tokenizer has no chat template, the template refuses the messages, or they fill the context.
        """
        return self.answer(prompt, max_new_tokens=max_new_tokens)[0]

    def answer(self, prompt: str | Sequence[Message | Mapping[str, str]], *, max_new_tokens: int) -> tuple[str, str]:
        """The answer that `chat` gives, and why it ended: "stop", or "length" if it was cut off."""
        ids = self.prompt_ids(prompt)
        n_prompt = ids.shape[1]
        if self.max_positions is not None:
            max_new_tokens = min(max_new_tokens, self.max_positions - n_prompt)
        if max_new_tokens < 1:
            raise UserError(f"{self.name}: a prompt of {n_prompt} tokens leaves no room for an answer")
        whole = self.with_head()
        answer = whole._generate(ids, max_new_tokens)[0, n_prompt:].tolist()
        ended = len(answer) < max_new_tokens or answer[-1] in whole.stop_ids
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)), "stop" if ended else "length"

    def prompt_ids(self, prompt: str | Sequence[Message | Mapping[str, str]]) -> torch.Tensor:
        """Token ids [1, T] of a prompt or of messages as the chat template renders them before an answer.

        Raises:
            UserError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.name}: the tokenizer has no chat template; an instruct model is needed")
        try:
            return torch.tensor([chat_template(self.tokenizer).prompt_ids(messages_of(prompt))])
        except SkippedError as reason:
            raise UserError(f"{self.name}: a prompt cannot be rendered: {reason}") from None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those the model's generation config names, eos, and what the template writes
        after an answer. Of a model with its head."""
        listed = self.model.generation_config.eos_token_id
        found = {*(listed if isinstance(listed, list) else [listed]), self.tokenizer.eos_token_id}
        if self.tokenizer.chat_template:
            found |= {*chat_template(self.tokenizer).facts.stop_ids}
        return frozenset(i for i in found if i is not None)

    def _generate(self, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        # Whatever a model's own generation_config.json asks for, the answer is the plain greedy one.
        greedy = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0
        )
        greedy.eos_token_id = sorted(self.stop_ids) or None
        ids = ids.to(self.device)
        with quiet(), torch.inference_mode():
            return self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)

    def _adopt(self, model: Any) -> None:
        self.model = model
        if hasattr(model, "chatsae_stack"):  # of a cut model, whose blocks are fewer
            place, path = model.chatsae_stack
            self.decoder: nn.Module = model.get_submodule(place)
            blocks: Any = self.decoder.get_submodule(path)
        else:
            self.decoder, _, blocks = stacks.decoder_of(model, self.n_layers, self._layer_path)
        self.blocks: nn.ModuleList = blocks
        self.cut = len(blocks) < self.n_layers

    def _load(self, config: PreTrainedConfig) -> Any:
        if self.head:
            return self._read_headed(config)
        for cut in stacks.cut_classes(config, self.n_layers, max(self.layers) + 1, self._layer_path):
            try:
                return self._read(cut, config)
            except UserError:
                pass  # an architecture that cannot be cut: read it whole, stop early
        if max(self.layers) + 1 < self.n_layers:
            console.say(f"{self.name}: this architecture is read from disk whole, all {self.n_layers} blocks")
        return self._read(stacks.whole_factory(config), config)

    def _read_headed(self, config: PreTrainedConfig) -> Any:
        model = self._read(stacks.headed_factory(config), config)
        if not stacks.multimodal(config):
            return model
        problem = text_problem(model)
        if problem is not None:  # some ask for their towers even without a picture
            model = self._read(stacks.headed_class(config), config)
            problem = text_problem(model)
        if problem is not None:
            raise UserError(f"{self.name}: with its head the model does not run on text alone: {problem}")
        return model

    def _read(self, factory: Any, config: PreTrainedConfig) -> Any:
        """Load through `factory.from_pretrained`; weights that the model does not have are not read."""
        kwargs = self._source.kwargs() | self._placement.load_options(config, self.name)
        if isinstance(factory, type) and issubclass(factory, PreTrainedModel):
            kwargs.pop("trust_remote_code")
        try:
            with quiet(downloads=not self._source.local):
                model, info = factory.from_pretrained(
                    self._source.path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
                )
                if "device_map" not in kwargs:
                    model = model.to(self.device)
                model = model.eval().requires_grad_(False)
        except LOAD_ERRORS as error:
            raise UserError(f"{self.name}: the weights cannot be loaded: {one_line(error)}") from None
        placement.refuse_offload(getattr(model, "hf_device_map", {}), self.name)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise UserError(f"{self.name}: {len(missing)} tensors are missing from the checkpoint, {missing[0]} first")
        return model

    def _probe(self) -> None:
        """One small forward: two sequences that differ in their last token only must agree before it."""
        if not self.layers:
            return
        ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]]) % self.vocab_size
        deepest = check_blocks(self, ids)[-1]
        if relative_error(deepest[0, :-1], deepest[1, :-1]) > 0.1:
            raise UserError(f"{self.name}: its tokens see those after them; a decoder-only (causal) model is needed")


def load_model(config: ModelConfig, *, head: bool = False) -> LanguageModel:
    """The model of a configuration; `head` loads it whole.

    Raises:
        UserError: see `LanguageModel`.
    """
    return LanguageModel(
        config.name,
        config.layers,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
        layer_path=config.layer_path,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
        random_weights=config.random_weights,
        head=head,
    )


def _check_layers(layers: Sequence[int], n_layers: int, name: str) -> tuple[int, ...]:
    if len(set(layers)) != len(layers):
        raise UserError(f"model.layers: a layer is asked for twice: {', '.join(map(str, layers))}")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise UserError(f"model.layers: layer {layer} does not exist: {name} has layers 0..{n_layers - 1}")
    return tuple(sorted(layers))


def _rope_split(text: PreTrainedConfig) -> int | None:
    """The length up to which longrope uses other frequencies, which it picks by the longest sequence of a forward."""
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if part.get("rope_type") == "longrope":
            return part.get("original_max_position_embeddings") or text.max_position_embeddings
    return None
