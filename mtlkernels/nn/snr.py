"""SNR: levels of sub-networks joined by routes that training opens and closes.

As in the paper z is sampled in training, one draw a route and step, and carries an L0 penalty; at test time it is
deterministic. An SNR in nextrec, another library, differs: its z is never sampled, it has no penalty, and what it
computes in training is what it computes at test time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _torch, _tracing
from mtlkernels._dtensors import has_dtensor
from mtlkernels.nn._arguments import Style, check_features, positive, units
from mtlkernels.nn._scripting import NotScriptable
from mtlkernels.nn.level import Expert, read_experts
from mtlkernels.nn.routes import RouteMap
from mtlkernels.ops._call import under_autocast
from mtlkernels.ops._checks import as_sequence, check_like, refuse_training
from mtlkernels.ops.hard_concrete import check_interval, hard_concrete, l0_penalty
from mtlkernels.ops.level import expert_mixture
from mtlkernels.ops.snr_aver import snr_aver
from mtlkernels.ops.snr_trans import snr_trans
from mtlkernels.routing import Routing


class SubNetworks(nn.Module):
    """The sub-networks of a level, each an MLP with an input of its own, or all with one.

    Without batch norm, active dropout and forward hooks they are one :func:`mtlkernels.expert_mixture`, each mixed by a
    gate that sees it alone; otherwise they run as modules.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        alone = tuple((e,) for e in range(len(experts)))
        self._routings = Routing((0,) * len(experts), alone), Routing(tuple(range(len(experts))), alone)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One [B, D] that every sub-network reads, or one for each → a tensor [B, H] for each."""
        count = len(self.experts)
        read = None if _tracing.needs_plain() else read_experts(_torch.unproxied(self.experts), bare_alone=True)
        if read is None or not read[1]:
            streams = [inputs] * count if isinstance(inputs, Tensor) else inputs
            return tuple(expert(x) for expert, x in zip(self.experts, streams, strict=True))
        x = inputs if isinstance(inputs, Tensor) else inputs[0]
        one, several = self._routings
        routing = one if isinstance(inputs, Tensor) else several
        alone = x.new_zeros(1, count).expand(x.shape[0], count)  # the softmax of one logit is 1
        weights, biases, options = read[0]
        return expert_mixture(inputs, weights, biases, alone, routing, **options)


class Joint(nn.Module):
    """The routes from J sub-networks to I above: ``log_alpha`` [I, J] and, for Trans, ``weight`` [I, J, H, H]."""

    weight: nn.Parameter | None

    def __init__(self, num_inputs: int, num_outputs: int, width: int, trans: bool, log_alpha: float, style: Style):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((num_outputs, num_inputs), log_alpha, **style.factory))
        if trans:
            weight = torch.empty(num_outputs, num_inputs, width, width, **style.factory)
            bound = 1 / math.sqrt(num_inputs * width)  # as of one linear layer that reads all sub-networks
            nn.init.uniform_(weight, -bound, bound)
            self.weight = nn.Parameter(weight)
        else:
            self.register_parameter("weight", None)

    def forward(self, u: Sequence[Tensor], z: Tensor, closed_grad: bool) -> tuple[Tensor, ...]:
        """J tensors [B, H] → I tensors [B, H]."""
        if self.weight is None:
            return snr_aver(u, z, closed_grad=closed_grad)
        return snr_trans(u, self.weight, z, closed_grad=closed_grad)


class SNR(NotScriptable, nn.Module):
    """Sub-network routing (Ma et al., AAAI 2019): ``v_i = sum_j z_ij W_ij u_j`` (Trans) or ``sum_j z_ij u_j`` (Aver).

    Every sub-network of the first level reads x, one above it what its open routes bring from the level below; the
    routes from the last level lead to the tasks. In training each route's coding variable z is sampled anew at every
    step (:func:`mtlkernels.hard_concrete`), so that adding ``l0_penalty()`` times a weight to the loss closes routes;
    in evaluation it is deterministic. A level without batch norm, and without dropout that drops, is one fused
    operator, its routes another; a closed route costs nothing.

    ``levels.{l}.experts.{j}.linears.{i}`` are the sub-networks' layers, ``joints.{l}.log_alpha`` [I, J] and, for Trans,
    ``joints.{l}.weight`` [I, J, H, H] belong to the routes out of level l.

    Args:
        in_features: D, the number of input features.
        num_tasks: T.
        subnet_units: the width of each layer of a sub-network; the last one is H.
        num_subnets: sub-networks, one number a level.
        mode: "trans" or "aver".
        activation: after every layer of a sub-network: "relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "none",
            "prelu" or "dice" (torch-rechub's), each with a slope to learn.
        batch_norm: normalise every layer before the activation.
        dropout: the probability with which the output of a layer is dropped in training.
        beta, gamma, zeta: of the hard concrete distribution.
        init_log_alpha: the first value of every ``log_alpha``; at 0 a route is open with probability 0.83.
        straight_through: round z to 0 or 1 in the forward pass, and take its gradient as if that had not happened. A
            closed route then has a gradient, and costs its share of the backward pass.
        device: where the parameters are made.
        dtype: float32, bfloat16, float16 or float64; by default torch's default.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a count is below one, a list is empty, a name is unknown, or a number is out of range.
    """

    _serves_only = False

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        subnet_units: Sequence[int],
        num_subnets: Sequence[int],
        mode: str = "trans",
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        *,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        init_log_alpha: float = 0.0,
        straight_through: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        style = Style(activation, batch_norm, dropout, device, dtype)
        super().__init__()
        self.in_features = positive("in_features", in_features)
        self.num_tasks = positive("num_tasks", num_tasks)
        self.subnet_units = units("subnet_units", subnet_units, may_be_empty=False)
        self.num_subnets = units("num_subnets", num_subnets, may_be_empty=False, of="level's number")
        self.mode = _mode(mode)
        check_interval(beta, gamma, zeta)
        if isinstance(init_log_alpha, bool) or not isinstance(init_log_alpha, (int, float)):
            raise TypeError(f"init_log_alpha must be a number, got {type(init_log_alpha).__name__}")
        if not -math.inf < init_log_alpha < math.inf:
            raise ValueError(f"init_log_alpha must be finite, got {init_log_alpha}")
        if not isinstance(straight_through, bool):
            raise TypeError(f"straight_through must be True or False, got {type(straight_through).__name__}")
        self.straight_through = straight_through
        self._interval = {"beta": float(beta), "gamma": float(gamma), "zeta": float(zeta)}
        width = self.out_features
        levels = []
        for level, count in enumerate(self.num_subnets):
            inputs = width if level else self.in_features
            levels.append(SubNetworks([Expert(inputs, self.subnet_units, style) for _ in range(count)]))
        self.levels = nn.ModuleList(levels)
        ends = (*self.num_subnets[1:], self.num_tasks)
        self.joints = nn.ModuleList(
            Joint(below, above, width, mode == "trans", float(init_log_alpha), style)
            for below, above in zip(self.num_subnets, ends, strict=True)
        )

    @property
    def out_features(self) -> int:
        """H, the width of every output."""
        return self.subnet_units[-1]

    if TYPE_CHECKING:  # what nn.Module leaves open

        def __call__(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]: ...

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """x [B, D] → T tensors [B, H].

        Args:
            x: the features.
            noise: for each level a tensor [I, J] in (0, 1) for the routes out of it, from which z is then sampled;
                without it torch's default generator is drawn from in training, and z is deterministic in evaluation.

        Raises:
            TypeError: an argument is of the wrong kind or dtype.
            ValueError: a shape or a number of tensors is wrong.
        """
        if self._serves_only and self.training:
            refuse_training()
        _tracing.quietly(check_features, x, self.in_features)
        coding = self.sample(noise)
        streams: Any = x
        for level, joint, z in zip(self.levels, self.joints, coding, strict=True):
            streams = joint(level(streams), z, self.straight_through)
        outputs: tuple[Tensor, ...] = streams
        return outputs

    def sample(self, noise: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The coding variables of one step, for each level a tensor [I, J]; ``noise`` as in :meth:`forward`."""
        alphas: list[Tensor] = [joint.log_alpha for joint in self._joints()]
        given: Sequence[Tensor | None]
        if noise is not None:
            given = as_sequence("noise", noise, "a sequence with a tensor for each level")
            if len(given) != len(alphas):
                raise ValueError(f"noise must hold a tensor for each of {len(alphas)} levels, got {len(given)}")
            for number, u in enumerate(given):
                if u is None:  # with which hard_concrete is deterministic
                    raise TypeError(f"noise[{number}] must be a tensor [I, J], got None")
        elif self.training:
            # A backward pass that is compiled to compute again what it has no memory for would draw again.
            eager = _torch.memory_budget() < 1
            draw: Any = torch.compiler.disable(_drawn, reason="noise is drawn once") if eager else _drawn
            given = draw(alphas)
        else:
            given = [None] * len(alphas)
        return self._coding(given)

    def _coding(self, noise: Sequence[Tensor | None]) -> list[Tensor]:
        joints = zip(self._joints(), noise, strict=True)
        drawn = [hard_concrete(joint.log_alpha, u, **self._interval) for joint, u in joints]
        if not self.straight_through:
            return drawn
        return [(z > 0.5).to(z.dtype) + (z - z.detach()) for z in drawn]

    def l0_penalty(self) -> Tensor:
        """The expected number of open routes: what to add to the loss, times a weight, so that routes close.

        A plain tensor also where ``log_alpha`` are DTensors, as those of FSDP2 are outside of a forward pass; all of
        their ranks have to call it then. TorchJD's autogram misses its gradient, as that of all that is computed
        outside of a module's call: leave it out of the losses whose matrix that makes.
        """
        total = torch.stack([l0_penalty(joint.log_alpha, **self._interval) for joint in self._joints()]).sum()
        return _whole(total) if not _torch.compiling() else total

    def routes(self) -> RouteMap:
        """Which routes are open at test time; ``print(model.routes())`` draws them.

        Where ``log_alpha`` are DTensors, as FSDP2 makes them, all of their ranks have to call it.
        """
        return RouteMap(self.mode, tuple(tuple(map(tuple, z.tolist())) for z in self._test_time()))

    def compact(self) -> CompactSNR:
        """A copy for serving, in evaluation mode: no closed routes, no sub-networks that nobody reads, z constant.

        Its parameters are copies. Its outputs are those of this network in evaluation mode, in float64 bit for bit.

        Raises:
            TypeError: parameters are DTensors.
        """
        sharded = [name for name, parameter in self.named_parameters() if has_dtensor((parameter,))]
        if sharded:
            raise TypeError(
                f"the parameters of an SNR must be plain tensors to be compacted, got a DTensor for {sharded[0]}:"
                " load the full state_dict, as torch.distributed.checkpoint.state_dict.get_model_state_dict gathers it"
                " with full_state_dict=True, into an SNR that is not distributed"
            )
        return CompactSNR(self)

    @torch.no_grad()
    def _test_time(self) -> list[Tensor]:
        return [_whole(z) for z in self._coding([None] * len(self.joints))]

    def _joints(self) -> list[Any]:
        return list(self.joints)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_tasks={self.num_tasks}, out_features={self.out_features},"
            f" mode={self.mode!r}"
        )


class CompactSNR(NotScriptable, nn.Module):
    """What is left of an :class:`SNR` when closed routes and unread sub-networks are gone; see :meth:`SNR.compact`."""

    _serves_only = False

    def __init__(self, model: SNR) -> None:
        super().__init__()
        self.in_features, self.num_tasks, self.out_features = model.in_features, model.num_tasks, model.out_features
        levels, joints = [], []
        above = tuple(range(model.num_tasks))
        below = list(zip(model.levels, model._joints(), model._test_time(), model.routes().read(), strict=True))
        for level, full, z, read in reversed(below):
            joints.append(OpenJoint(full.weight, z, above, read))
            if not read:  # nothing below matters
                break
            experts: Any = level.experts
            levels.append(SubNetworks([copy.deepcopy(experts[j]) for j in read]))
            above = read
        self.levels = nn.ModuleList(reversed(levels))
        self.joints = nn.ModuleList(reversed(joints))
        self.eval()

    if TYPE_CHECKING:  # what nn.Module leaves open

        def __call__(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, D] → T tensors [B, H]."""
        if self._serves_only and self.training:
            refuse_training()
        _tracing.quietly(check_features, x, self.in_features)
        streams: Any = x
        first = len(self.joints) - len(self.levels)  # 1 where the lowest joint has no open route
        joints: list[Any] = list(self.joints)
        for joint in joints[:first]:  # x is checked and zeros are cast as by the sub-networks that are gone
            _tracing.quietly(check_like, "x", x, "the network", joint.z)
            zeros = [x.new_zeros(x.shape[0], self.out_features, dtype=joint.z.dtype) for _ in range(joint.num_outputs)]
            (streams,) = under_autocast(joint.z, zeros)
        for level, joint in zip(self.levels, joints[first:], strict=True):
            streams = joint(level(streams))
        return tuple(streams)


class OpenJoint(nn.Module):
    """The open routes between kept sub-networks: z [I, J] as a constant, and for Trans the open ones' matrices."""

    z: Tensor

    def __init__(self, weight: Tensor | None, z: Tensor, outputs: Sequence[int], inputs: Sequence[int]) -> None:
        super().__init__()
        self.num_outputs = len(outputs)
        self.register_buffer("z", z[list(outputs)][:, list(inputs)].clone())
        self._open = _open_routes(self.z)
        self._shape = None if weight is None else weight.shape[2:]
        self.weights = nn.ParameterList(
            [] if weight is None else [weight.detach()[outputs[i], inputs[j]].clone() for i, j in self._open]
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Refuses the state of other routes, as matrices belong to those that were open."""
        z = state_dict.get(f"{prefix}z")
        fits = isinstance(z, Tensor) and z.shape == self.z.shape
        if fits and self._shape is not None and not z.is_meta and _open_routes(z) != self._open:
            errors.append(f"{prefix}z must be non-zero for the routes that are open here, and for no others")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, u: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """J tensors [B, H] → I tensors [B, H]."""
        if self._shape is None:
            return snr_aver(u, self.z, closed_grad=False)
        matrices = self._matrices()
        if _tracing.needs_plain():
            return self._plain(u, matrices)
        nothing = matrices[0].new_zeros(1, 1).expand(self._shape)  # of a closed route only the shape is looked at
        weight = [[nothing] * len(u) for _ in range(self.num_outputs)]
        for (i, j), matrix in zip(self._open, matrices, strict=True):
            weight[i][j] = matrix
        return snr_trans(u, weight, self.z, closed_grad=False)

    def _matrices(self) -> list[Any]:
        """Those of the open routes, by their names: one that was pruned or parametrized comes last when it is back."""
        # Attribute look-ups would cost more than a row does.
        parameters = self.weights._parameters
        found = [parameters.get(str(number)) for number in range(len(self._open))]
        return list(self.weights) if any(matrix is None for matrix in found) else found

    def _plain(self, u: Sequence[Tensor], matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The open routes alone by PyTorch's own operators: what is traced has nothing of the closed ones either."""
        assert self._shape is not None
        outputs = [u[0].new_zeros(u[0].shape[0], self._shape[0]) for _ in range(self.num_outputs)]
        for (i, j), matrix in zip(self._open, matrices, strict=True):
            outputs[i] = outputs[i] + self.z[i, j].to(u[j].dtype) * F.linear(u[j], matrix)
        return tuple(outputs)


def _drawn(alphas: Sequence[Tensor]) -> list[Tensor]:
    return [torch.rand(a.shape, device=a.device, dtype=torch.promote_types(a.dtype, torch.float32)) for a in alphas]


def _open_routes(z: Tensor) -> list[tuple[int, ...]]:
    """Those of a matrix of coding variables, row by row."""
    return [tuple(route) for route in z.nonzero().tolist()]


def _whole(tensor: Any) -> Tensor:
    """A plain tensor, of a DTensor the whole, which its ranks gather."""
    found: Tensor = tensor.full_tensor() if has_dtensor((tensor,)) else tensor
    return found


def _mode(mode: Any) -> str:
    if not isinstance(mode, str):
        raise TypeError(f"mode must be 'trans' or 'aver', got {type(mode).__name__}")
    if mode not in ("trans", "aver"):
        raise ValueError(f"mode must be 'trans' or 'aver', got {mode!r}")
    return mode
