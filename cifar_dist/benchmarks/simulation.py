"""How long a step would take on many GPUs: a simulation, from what was measured on one and a model of the network.

The model: gradients go around a ring of n devices (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
2009): 2 (n - 1) / n of their bytes over the slowest link, and 2 (n - 1) messages one after another. On several
machines that is done within each first, then by one ring between them. The backward pass hides what is exchanged while
it runs, but for the last bucket, which it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Assumed, not measured. Bytes/s and seconds per message, of a device within a machine and between machines."""

    devices_per_machine: int = 8
    inner_bandwidth: float = 300e9
    inner_latency: float = 5e-6
    outer_bandwidth: float = 40e9
    outer_latency: float = 15e-6
    backward_share: float = 2 / 3
    """Of a step's computing, the part that hides exchange."""
    bucket_bytes: float = 25 * 2**20
    """The last of these cannot be hidden; all there is, for networks as small as these."""

    def describe(self) -> str:
        return (
            f"{self.devices_per_machine} GPUs a machine; within {self.inner_bandwidth / 1e9:.0f} GB/s and "
            f"{self.inner_latency * 1e6:.0f} us a message, between {self.outer_bandwidth / 1e9:.0f} GB/s a GPU and "
            f"{self.outer_latency * 1e6:.0f} us; the backward pass, {self.backward_share:.0%} of a step, hides the "
            f"exchange but for the last bucket of {self.bucket_bytes / 2**20:.0f} MiB"
        )


def exchange_seconds(gradient_bytes: float, num: int, network: Network) -> float:
    """Time of an all-reduce over `num` devices by itself."""
    inner = min(num, network.devices_per_machine)
    machines = -(-num // network.devices_per_machine)
    seconds = _ring(gradient_bytes, inner, network.inner_bandwidth, network.inner_latency)
    return seconds + _ring(gradient_bytes / inner, machines, network.outer_bandwidth, network.outer_latency)


def _ring(num_bytes: float, num: int, bandwidth: float, latency: float) -> float:
    return 2 * (num - 1) * (num_bytes / num / bandwidth + latency)


def step_seconds(compute_seconds: float, gradient_bytes: float, num: int, network: Network) -> float:
    """Time of a step in which each of `num` devices computes for `compute_seconds`."""
    exchange = exchange_seconds(gradient_bytes, num, network)
    last = exchange_seconds(min(network.bucket_bytes, gradient_bytes), num, network)
    hidden = min(exchange - last, network.backward_share * compute_seconds)
    return compute_seconds + exchange - hidden
