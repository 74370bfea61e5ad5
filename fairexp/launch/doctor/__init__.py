"""The verb `doctor`: what a run here, or on a partition of a cluster, would trip over."""

from fairexp.launch.doctor.run import doctor as doctor
