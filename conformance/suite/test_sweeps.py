from conformance.checks import sweeps
from conformance.suite.properties import as_test

test_sweeps = as_test(sweeps.sweeps)
