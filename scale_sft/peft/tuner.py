"""`SpielModel`: PEFT's tuner of the method, the owner of all its layers in one model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.experts import parse_slice
from scale_sft.model.targets import budget_of
from scale_sft.spiel.seeding import random_indices

from . import combine, files
from .config import SpielConfig
from .hooks import follow_steps
from .layer import BASE_KEY, Linear, SpielLayer, require_one
from .registry import PREFIX
from .session import Session
from .targets import default_targets, refuse_target, refuse_tied


class Sessions(dict[str, Session]):
    """The trainings of a model's adapters, by name; a copy of the model begins without any."""

    def __deepcopy__(self, memo: Any) -> Sessions:
        return Sessions()


class SpielModel(BaseTuner):
    """A model whose target layers carry sparse deltas, made by `get_peft_model` and `PeftModel.from_pretrained`.

    The weights hold the effective values of the active adapter; one adapter is active at a time. Everything else is as
    PEFT has it. Sessions, by adapter, hold what training needs; they are made by the first backward pass.
    """

    prefix: str = PREFIX
    tuner_layer_cls = SpielLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    uses_shared_state = True  # direct injection would bypass the loading of indices

    def __init__(self, *args: Any, **kwargs: Any):
        self.__dict__["sessions"] = Sessions()
        self.__dict__["total_steps"] = None
        self.__dict__["_warm"] = set()
        self.__dict__["_checked"] = set()  # adapters whose whole session was intact since the last forward pass
        super().__init__(*args, **kwargs)
        follow_steps(self)

    # --- adapters ---------------------------------------------------------------------------------------------------

    def spiel_layers(self, adapter: str | None = None) -> Iterator[Linear]:
        """Yield the layers, or those that have an adapter, in the model's order."""
        for module in self.model.modules():
            if isinstance(module, Linear) and (adapter is None or module.has(adapter)):
                yield module

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give the targeted layers a new adapter at random entries, its deltas zero.

        An adapter that is added with the config object of another one begins as its copy, as reference adapters do.

        Raises:
            UserError: a target cannot carry deltas, or the budget does not fit; no adapter was added.
        """
        config = self.peft_config[adapter_name]
        twin = next((name for name, one in self.peft_config.items() if name != adapter_name and one is config), None)
        if twin is not None:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        self.__dict__["_wrapped"] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._fill(adapter_name, config, twin)
        except BaseException:
            self._withdraw(adapter_name)
            raise

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Resolve default targets, and refuse targets that are saved as a whole too."""
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(model)
        named, whole = peft_config.target_modules, peft_config.modules_to_save or []
        both = [name for name in whole if not isinstance(named, str) and name in named]
        if both:
            raise UserError(
                f"modules_to_save: got '{both[0]}', which is in target_modules too, expected one of them. Fix: "
                "leave it out of the other"
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Wrap one targeted layer; `_fill` gives it entries once all are known."""
        layer = target
        if not isinstance(target, Linear):
            refuse_target(target, current_key)
            layer = Linear(target, f"{current_key}.weight", self)
            self._replace_module(parent, target_name, layer, target)
        self.__dict__["_wrapped"].append(layer)

    def _fill(self, adapter: str, config: SpielConfig, twin: str | None) -> None:
        """Choose the entries of a new adapter in all its layers."""
        layers: list[Linear] = self.__dict__["_wrapped"]
        refuse_tied(self.model, layers)
        shapes = {layer.weight_name: layer.shape for layer in layers}
        counts = config.entries_per_weight or budget_of(config.sparse_options(), shapes)
        if set(counts) != set(shapes) or any(counts[name] > rows * width for name, (rows, width) in shapes.items()):
            files.require_base(layers, config.facts or {})  # of another base all else would mislead
        experts = [name for name in counts if parse_slice(name)]
        if experts:
            raise UserError(
                f"adapter: got {len(experts):,} experts of fused parameters ('{experts[0]}', ...), expected weights of "
                "nn.Linear or Conv1D, which PEFT can wrap. Fix: scale_sft.load_adapter(model, folder), or merge it"
            )
        if set(counts) != set(shapes):
            odd = sorted(set(counts) ^ set(shapes))[0]
            raise UserError(
                f"entries_per_weight: got {len(counts)} weights for {len(shapes)} targets, which differ in '{odd}'. "
                "Fix: use the target_modules of the adapter, and its base"
            )
        for layer in layers:
            name = layer.weight_name
            if twin is not None and layer.has(twin):
                layer.add(adapter, layer.spiel_indices[twin], layer.spiel_values[twin].detach())
            else:
                layer.add(adapter, random_indices(layer.shape, counts[name], config.seed, name))
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if adapter not in self.active_adapters:
            self.set_requires_grad(adapter, False)

    def _withdraw(self, adapter: str) -> None:
        """Undo `inject_adapter`: forget the adapter, and unwrap layers that have none."""
        self.peft_config.pop(adapter, None)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, Linear):
                if module.has(adapter):
                    module.delete_adapter(adapter)
                if not module.spiel_values:
                    parent, _, leaf = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), leaf, module.base_layer)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: a swap in O(K).

        Raises:
            UserError: there are several; nothing has changed.
        """
        require_one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the next one becomes so."""
        super().delete_adapter(adapter_name)
        self.sessions.pop(adapter_name, None)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others, on the union of their entries; it is not active yet.

        Args:
            adapters: names of the others.
            weights: a factor for each.
            adapter_name: of the new one.
            combination_type: linear (a weighted sum), ties, dare_linear, dare_ties or magnitude_prune, as in PEFT.
            density: fraction of an adapter's entries that the last four keep.
            majority_sign_method: total or frequency (ties, dare_ties).

        Raises:
            UserError: a name, a number or the type is not possible.
        """
        combine.require_possible(self.peft_config, adapters, weights, adapter_name, combination_type, density)
        made = {}
        for layer in self.spiel_layers():
            if any(layer.has(one) for one in adapters):
                made[layer.weight_name] = combine.combined(
                    layer, adapters, weights, combination_type, density, majority_sign_method
                )
        config = copy.deepcopy(self.peft_config[adapters[0]])
        config.entries_per_weight = {name: indices.numel() for name, (indices, _) in made.items()}
        config.target_modules = {name.removesuffix(".weight") for name in made}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.inference_mode = True
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in self.spiel_layers(adapter_name):
            layer.replace(adapter_name, *made[layer.weight_name])

    # --- training ---------------------------------------------------------------------------------------------------

    def gradient(self, layer: Linear, adapter: str, left: Tensor, right: Tensor) -> Tensor:
        """Compute the gradient of one layer's deltas: see `Session.gradient`.

        The first layer of a backward pass looks at all parameters of the session, the others at their own.
        """
        session = self.sessions.get(adapter)
        if session is None or adapter not in self._checked or not session.holds(layer):
            session = self.session(adapter)
            self._checked.add(adapter)
        return session.gradient(layer, left, right)

    def session(self, adapter: str) -> Session:
        """Return the training of an adapter; the first call begins it."""
        session = self.sessions.get(adapter)
        if session is None or not session.intact:
            follow_steps(self)  # a copy of a model was not made by __init__
            config = self.peft_config[adapter]
            total = config.total_steps or self.total_steps
            fresh = Session(adapter, config, self.spiel_layers(adapter), total, adapter in self._warm)
            if session is not None:
                fresh.load(session.state())
            session = self.sessions[adapter] = fresh
        return session

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse a batch that mixes adapters, which PEFT would otherwise compute with the active one."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names: got one for each row, expected none, as a weight holds one adapter at a time. Fix: "
                "call set_adapter, and the model once for each adapter"
            )
        yield

    def begin(self, optimizer: torch.optim.Optimizer, total_steps: int | None = None, *, fresh: bool = False) -> None:
        """Begin a training of the active adapter, or resume it from an optimizer's loaded state.

        Args:
            optimizer: of its parameters.
            total_steps: of the whole training, if the config does not say; None: as before.
            fresh: begin at step 0, although the optimizer may have been through an earlier training.
        """
        self.__dict__["total_steps"] = total_steps or self.total_steps
        for adapter in self.active_adapters:
            if not any(layer.spiel_values[adapter].requires_grad for layer in self.spiel_layers(adapter)):
                continue
            earlier = self.sessions.pop(adapter, None)
            if earlier is not None and earlier.steps:
                self._warm.add(adapter)
            self.session(adapter).resume(optimizer, fresh=fresh)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow a step of any optimizer: see `hooks`."""
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for adapter, session in list(self.sessions.items()):
            if not any(id(layer.spiel_values[adapter]) in held for layer in session.layers.values()):
                if session.received and any(id(layer.weight) in held for layer in session.layers.values()):
                    raise UserError(
                        f"optimizer: got one of the base's weights, which are frozen, expected the deltas of adapter "
                        f"'{adapter}'. Fix: make it after get_peft_model, from the PEFT model's parameters()"
                    )
                continue
            if session.received:
                session.after_step(optimizer)
            else:
                session.write()  # momentum may have moved it

    def write(self) -> None:
        """Write the present deltas of all adapters into the weights that hold them."""
        for layer in self.spiel_layers():
            if layer.resident is not None:
                layer.write(layer.resident)
                self.written(layer.resident)

    def check(self, layer: Linear) -> None:
        """Let the first layer of a forward pass check that the weights hold the deltas."""
        session = self.sessions.get(layer.resident)
        if session is not None and layer is next(iter(session.layers.values())):
            self._checked.discard(layer.resident)
            session.check()

    def written(self, adapter: str) -> None:
        """Note that a weight has taken an adapter's present values."""
        if adapter in self.sessions:
            self.sessions[adapter].written()

    def reloaded(self, layer: Linear) -> None:
        """Note that a layer has loaded other indices and values."""
        for session in self.sessions.values():
            session.reload(layer)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Indices, which DistributedDataParallel would broadcast in every forward pass; they are equal anyway."""
        marked = [name for name, _ in self.named_buffers() if ".spiel_indices." in name]
        return [f"base_model.{name}" for name in marked]

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        files.bring_up_to_date(config, adapter_name, list(tuner_of(model).spiel_layers(adapter_name)))
        return {key: tensor for key, tensor in found.items() if BASE_KEY not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return files.key_in_file(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner = tuner_of(model)
        files.check_loaded(state_dict, config, adapter_name, list(tuner.spiel_layers(adapter_name)))
        tuner._warm.add(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def tuner_in(model: nn.Module | None) -> SpielModel | None:
    """Find the tuner in a model, wrapped or not; None: there is no SpIEL adapter in it."""
    modules = model.modules() if model is not None else ()
    return next((module for module in modules if isinstance(module, SpielModel)), None)


def tuner_of(model: nn.Module) -> SpielModel:
    """Find the tuner in a PEFT model, wrapped or not.

    Raises:
        UserError: there is none.
    """
    found = tuner_in(model)
    if found is None:
        raise UserError("model: got one without SpIEL layers, expected a PEFT model with a SpielConfig")
    return found
