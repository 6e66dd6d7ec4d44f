from conformance.checks import calls, masks, spelled
from conformance.suite.properties import as_test

test_embeddings = as_test(calls.embeddings)
test_masks = as_test(masks.masks)
test_tokens = as_test(calls.tokens)
test_sdpa = as_test(calls.sdpa)
test_sdpa_reference = as_test(calls.sdpa_reference)
test_spelled = as_test(spelled.spelled)
