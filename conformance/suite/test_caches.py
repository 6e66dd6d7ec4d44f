from conformance.checks import caches
from conformance.suite.properties import as_test

test_handed_over = as_test(caches.handed_over)
test_returned = as_test(caches.returned)
test_surgery = as_test(caches.surgery)
