from conformance.checks import attribution
from conformance.suite.properties import as_test

test_gradients = as_test(attribution.gradients)
test_patching = as_test(attribution.attribution_patching)
