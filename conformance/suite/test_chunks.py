from conformance.checks import chunks
from conformance.suite.properties import as_test

test_whole = as_test(chunks.whole)
test_edits = as_test(chunks.edits)
