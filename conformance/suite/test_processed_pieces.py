from conformance.checks import processed_pieces
from conformance.suite.properties import as_test

test_processed = as_test(processed_pieces.processed)
