"""The suites by name. A new one is a file beside these that makes a ``Suite`` or a ``Study``, and a line here."""

from __future__ import annotations

from benchmarks.harness.case import Study, Suite
from benchmarks.suites import (
    convert,
    gpu_host,
    mixture,
    pcgrad,
    pcgrad_ablation,
    pcgrad_rarely,
    pcgrad_step,
    serving,
    snr,
    snr_study,
)

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (mixture.SUITE, convert.SUITE, pcgrad.SUITE, pcgrad_step.SUITE, snr.SUITE)
}
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (pcgrad_ablation.STUDY, pcgrad_rarely.STUDY, snr_study.STUDY, gpu_host.STUDY, serving.STUDY)
}
