"""What ``python -m fastloss`` runs: the self-check, the benchmark, its peers and its report."""
