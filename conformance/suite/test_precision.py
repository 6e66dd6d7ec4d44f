from conformance.checks import precision
from conformance.suite.properties import as_test

test_everywhere = as_test(precision.everywhere)
test_no_cache = as_test(precision.no_cache)
test_cache = as_test(precision.cache)
test_returned = as_test(precision.returned)
