from conformance.checks import continuation, text
from conformance.suite.properties import as_test

test_tokens = as_test(text.tokens)
test_forward = as_test(text.forward)
test_loss = as_test(text.loss)
test_generation = as_test(continuation.generation)
test_streaming = as_test(continuation.streaming)
