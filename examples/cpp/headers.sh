#!/bin/sh
# headers.sh FOLDER: the headers of ONNX Runtime and nlohmann-json out of Debian 13's packages, without root and on any
# machine with apt and Debian's keys. On Debian 13 itself: apt install libonnxruntime-dev nlohmann-json3-dev
set -eu
mkdir -p "$1/apt/lists/partial" "$1/apt/cache/archives/partial"
cd "$1"
touch apt/status
echo "deb http://deb.debian.org/debian trixie main" > apt/sources.list
own="-qq -o Dir::Etc::SourceList=$PWD/apt/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State=$PWD/apt"
own="$own -o Dir::State::status=$PWD/apt/status -o Dir::Cache=$PWD/apt/cache -o APT::Sandbox::User="
# shellcheck disable=SC2086
apt-get $own update
# shellcheck disable=SC2086
apt-get $own download libonnxruntime-dev nlohmann-json3-dev
for package in *.deb; do dpkg-deb --extract "$package" .; done
rm -r apt ./*.deb
