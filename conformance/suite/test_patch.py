from conformance.checks import patch
from conformance.suite.properties import as_test

test_life = as_test(patch.life)
test_strange = as_test(patch.strange)
