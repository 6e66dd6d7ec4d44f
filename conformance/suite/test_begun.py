from conformance.checks.begun import CHECKS
from conformance.suite.properties import as_test

globals().update({f"test_{check.name.partition('.')[2]}": as_test(check) for check in CHECKS})
