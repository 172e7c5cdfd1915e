"""What our training is compared with: other people's methods, through their code or in ours."""

from fraqat.baselines.lapq import CalibrationLoss, LapqResult, search_step_sizes_
from fraqat.baselines.layers import LayerScheme, PeerLayer, peer_layers
from fraqat.baselines.peers import PeerName, PeerResult, train_peer, train_steps_
from fraqat.baselines.powell import PowellResult, minimize_powell
from fraqat.baselines.torchao_layers import ParqSpec

__all__ = [
    "CalibrationLoss",
    "LapqResult",
    "LayerScheme",
    "ParqSpec",
    "PeerLayer",
    "PeerName",
    "PeerResult",
    "PowellResult",
    "minimize_powell",
    "peer_layers",
    "search_step_sizes_",
    "train_peer",
    "train_steps_",
]
