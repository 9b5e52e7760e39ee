"""What the model takes for granted of a card, each number with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

WHITEPAPER = 'NVIDIA, "H100 Tensor Core GPU Architecture"'
GUIDE = "NVIDIA, CUDA C++ programming guide, compute capability 9.0"
BENCHES = "result files of github.com/te42kyfo/gpu-benches"
LUO = 'W. Luo et al., "Dissecting the NVIDIA Hopper architecture through microbenchmarking", arXiv 2501.12084'


@dataclass(frozen=True)
class Card:
    """Rates are of one multiprocessor in a cycle unless said otherwise; ``sources`` has a line for each number."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    registers: int
    warps: int
    programs: int
    shared: int  # bytes
    reserved: int  # bytes of it that each program takes beside its own
    schedulers: int
    multiply_adds: int  # of tensor cores, in bfloat16 and float16
    warp_level: float  # the share of these that products of single warps (HMMA) reach
    shared_bytes: int
    l2_bytes: float
    l2_capacity: int  # bytes
    memory: float  # bytes a second
    memory_share: float
    l1_latency: int  # cycles
    l2_latency: int
    memory_latency: int
    barrier: int  # cycles
    product_latency: int  # cycles from the end of a product in tensor cores until a program that waits for it goes on
    issue_interval: int  # cycles between two instructions of a warp
    ramp: float  # seconds
    sources: dict[str, str]

    @property
    def peak(self) -> float:
        """FLOP a second."""
        return 2.0 * self.multiply_adds * self.multiprocessors * self.clock


H100 = Card(
    name="H100 SXM",
    multiprocessors=132,
    clock=1.83e9,
    registers=65536,
    warps=64,
    programs=32,
    shared=228 * 1024,
    reserved=1024,
    schedulers=4,
    multiply_adds=2048,
    warp_level=0.63,
    shared_bytes=128,
    l2_bytes=34.0,
    l2_capacity=40 * 10**6,
    memory=3.35e12,
    memory_share=0.89,
    l1_latency=34,
    l2_latency=265,
    memory_latency=650,
    barrier=30,
    product_latency=60,
    issue_interval=2,
    ramp=1.5e-6,
    sources={
        "multiprocessors": WHITEPAPER,
        "clock": f"Hz with tensor cores at work: {WHITEPAPER}; assumed to hold, without throttling",
        "registers": GUIDE,
        "warps": GUIDE,
        "programs": GUIDE,
        "shared": GUIDE,
        "reserved": GUIDE,
        "schedulers": f"an instruction a cycle each: {WHITEPAPER}",
        "multiply_adds": f"989 TFLOP/s: {WHITEPAPER}; HGMMA is assumed to reach it while its operands arrive",
        "warp_level": f"of mma.sync: {LUO}",
        "shared_bytes": f"32 banks of 4: {GUIDE}; operands of HGMMA and copies from L2 are assumed to share it",
        "l2_bytes": f"{BENCHES}: 6.9 TB/s on an H100 PCIe; an H200 has 37. All multiprocessors read at once",
        "l2_capacity": f"{BENCHES}: an H200 reads sets of up to so many of its 50 MB at full speed",
        "memory": "NVIDIA's data sheet of the H100",
        "memory_share": f"assumed; {BENCHES}: 1.97 of 2.04 TB/s on an H100 PCIe, 3.89 of 4.8 on an H200",
        "l1_latency": f"{BENCHES}, H100 PCIe",
        "l2_latency": f"{BENCHES}, H100 PCIe, the near half",
        "memory_latency": f"{BENCHES}, H100 PCIe",
        "barrier": "assumed: about an access to shared memory",
        "product_latency": "assumed: two barriers",
        "issue_interval": "assumed: every other instruction of a warp waits 4 cycles for the one before",
        "ramp": "assumed: from the last program of a launch to the first of the next on a stream",
    },
)
CARDS = {90: H100}
