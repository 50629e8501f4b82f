"""Writes the gate's judgement as JUnit XML, which every CI system shows. Each check is a test case."""

from xml.etree import ElementTree

from models.gate import Check, Judgement

SUITE = "fullrank check"


def junit(encoder: str, judgement: Judgement) -> bytes:
    """The report in UTF-8. A judgement without checks, such as of an unreadable file, becomes one test case, `load`."""
    checks = judgement.checks or (Check("load", judgement.reason, float("nan"), float("nan"), judgement.passed),)
    failures = sum(not check.passed for check in checks)
    suite = ElementTree.Element(
        "testsuite", name=SUITE, tests=str(len(checks)), failures=str(failures), errors="0", skipped="0"
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{SUITE}.{encoder}", name=check.name, time="0")
        if not check.passed:
            ElementTree.SubElement(case, "failure", message=str(check)).text = judgement.reason
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    report: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return report
