"""Prometheus' text format: what is counted, bucket by bucket."""

from align.serving.metrics import Metrics


def samples(metrics, **gauges):
    lines = metrics.render(gauges).splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_counters_and_histograms_add_up():
    metrics = Metrics()
    for status in ("200", "200", "413"):
        metrics.requests.add(route="/v1/models", status=status)
    metrics.completion_tokens.add(123_456_789)
    for seconds in (0.05, 0.06, 3.0, 500.0):  # a bound belongs to its bucket
        metrics.answer.observe(seconds)
    found = samples(metrics, align_engine_ready=("1 or 0.", True))
    assert found['align_requests_total{route="/v1/models",status="200"}'] == 2
    assert found['align_requests_total{route="/v1/models",status="413"}'] == 1
    assert found["align_completion_tokens_total"] == 123_456_789
    buckets = [
        found[f'align_answer_seconds_bucket{{le="{le}"}}']
        for le in ("0.05", "0.1", "2.5", "5", "120", "+Inf")
    ]
    assert buckets == [1, 2, 2, 3, 3, 4]
    assert found["align_answer_seconds_count"] == 4
    assert found["align_answer_seconds_sum"] == 503.11
    assert found["align_answer_failures_total"] == 0
    assert found["align_engine_ready"] == 1
