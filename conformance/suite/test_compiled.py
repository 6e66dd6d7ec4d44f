from conformance.checks import compiled
from conformance.suite.properties import as_test

test_bridge = as_test(compiled.bridge)
test_patched_model = as_test(compiled.patched_model)
