"""The adapters that the app ships."""

from agl_trl.artifacts.files import ADAPTER_FILE, sha256
from agl_trl.drift.report import DriftReport
from agl_trl.space.models import ADAPTERS


def test_shipped_adapters_are_what_their_reports_say():
    size = sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file())
    assert size < 1.5e6
    for name, kept in (("plain", False), ("agl", True)):
        report = DriftReport.from_pretrained(ADAPTERS / name)
        assert report.adapter_sha256 == sha256(ADAPTERS / name / ADAPTER_FILE)
        assert (report.behaviour.refusal(tuned=True).value > 0.95) == kept
