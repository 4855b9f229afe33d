# A site's program in its container, as compose starts it. Compose starts what has ended again, and
# knows no exit status that means "no more"; `join` ends with 3 once the coordinator has revoked
# the site. So this waits then, and tells the health check by a file.
[ "$1" = join ] || exec crafts-client "$@"
trap 'kill "$!"' TERM INT
crafts-client "$@" &
site=$!
wait "$site"
status=$?
# A signal ends the first wait before the program has ended.
while kill -0 "$site" 2>/dev/null; do
    wait "$site"
    status=$?
done
[ "$status" = 3 ] || exit "$status"
trap 'kill "$!"; exit 0' TERM INT
: >"${TMPDIR:-/tmp}/revoked"
echo "site.sh: the coordinator has revoked this site; nothing is started again until this container is" >&2
while :; do
    sleep 3600 &
    wait $!
done
