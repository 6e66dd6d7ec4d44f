from conformance.checks import untouched
from conformance.suite.properties import as_test

test_untouched = as_test(untouched.untouched)
