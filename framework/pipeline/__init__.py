"""Pipeline stages with gradient boundaries: DeepSpeed's pipeline engine under the schedules of ``execution``."""
