from conformance.checks import clamp
from conformance.suite.properties import as_test

test_post_clip = as_test(clamp.post_clip)
test_kink = as_test(clamp.kink)
test_sizes = as_test(clamp.sizes)
