from conformance.checks import processing
from conformance.suite.properties import as_test

test_processed = as_test(processing.processed)
test_forward = as_test(processing.forward)
