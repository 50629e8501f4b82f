"""Writes the gate's judgement as JUnit XML, which every CI system shows. Each check is a test case."""

import re
from xml.etree import ElementTree

from models.gate import Check, Judgement

SUITE = "fullrank check"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may hold, even escaped; names of files may hold them."""


def junit(encoder: str, judgement: Judgement) -> bytes:
    """The report in UTF-8. A judgement without checks, such as of an unreadable file, becomes one test case, `load`."""
    encoder, reason = (NO_XML.sub(lambda found: repr(found[0])[1:-1], it) for it in (encoder, judgement.reason))
    checks = judgement.checks or (Check("load", reason, float("nan"), float("nan"), judgement.passed),)
    failures = sum(not check.passed for check in checks)
    suite = ElementTree.Element(
        "testsuite", name=SUITE, tests=str(len(checks)), failures=str(failures), errors="0", skipped="0"
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{SUITE}.{encoder}", name=check.name, time="0")
        if not check.passed:
            ElementTree.SubElement(case, "failure", message=str(check)).text = reason
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    report: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return report
