# Runs PROGRAM with --device DEVICE and MORE where that cannot be had: it must end with exit code 1, nothing on stdout, and one
# line that says what is missing.
get_filename_component(name ${PROGRAM} NAME)
set(arguments "")
if(name STREQUAL "predict")
  set(arguments --tuner no-folder no-picture.png)
endif()
set(ENV{CUDA_VISIBLE_DEVICES} "")
execute_process(COMMAND ${PROGRAM} ${arguments} --device ${DEVICE} ${MORE} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
if(NOT code EQUAL 1 OR NOT out STREQUAL "" OR NOT err MATCHES "^${name}: ${EXPECTED}[^\n]*\n$")
  message(FATAL_ERROR "${name} --device ${DEVICE} ${MORE}: expected exit code 1 and \"${name}: ${EXPECTED}\", got ${code}, \"${out}\" and \"${err}\"")
endif()
message(STATUS "${err}")
