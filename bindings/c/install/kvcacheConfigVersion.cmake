# Which versions of libkvcache serve a program that asks for another: before 1.0 those of the same
# minor version, then those of the same major version. Never an older one.
set(PACKAGE_VERSION "0.1.0")

string(REGEX MATCH "^0\\.[0-9]+|^[1-9][0-9]*" _kvcache_abi "${PACKAGE_VERSION}")
set(_kvcache_asked "${PACKAGE_FIND_VERSION_MAJOR}")
if("${PACKAGE_FIND_VERSION_MAJOR}" STREQUAL "0")
  set(_kvcache_asked "0.${PACKAGE_FIND_VERSION_MINOR}")
endif()
set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(_kvcache_abi STREQUAL _kvcache_asked AND NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()

# A program of another word size cannot link it.
if(CMAKE_SIZEOF_VOID_P AND NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(PACKAGE_VERSION_UNSUITABLE TRUE)
endif()
unset(_kvcache_abi)
unset(_kvcache_asked)
