from conformance.checks import frozen
from conformance.suite.properties import as_test

test_frozen = as_test(frozen.frozen)
