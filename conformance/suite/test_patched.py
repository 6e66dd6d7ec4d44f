from conformance.checks import patched
from conformance.suite.properties import as_test

test_modes = as_test(patched.modes)
test_threads = as_test(patched.threads)
