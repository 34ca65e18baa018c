"""The commands of `tritonlm` other than serve and gateway, one file per group."""
