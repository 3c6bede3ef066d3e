-- Run once on every new connection. ARGV: client, nonce, the highest revision that this client has seen.
-- Tries every command that the other scripts use, in a form that changes nothing, so that missing
-- permissions are found now and never stop a script half-way. Raises the revision past everything that a
-- server which has since lost data has shown to this client, and to anybody before its clock's time.
local probes = {
  { 'HDEL', H, '' }, { 'HGET', H, '' }, { 'HMGET', H, '' },
  { 'ZSCORE', T, '' }, { 'ZRANGEBYSCORE', T, '1', '0', 'WITHSCORES', 'LIMIT', 0, 1 },
  { 'ZRANGEBYLEX', Z, '[b', '[a' }, { 'ZREVRANGEBYLEX', Z, '[a', '[b' },
  { 'ZADD', Z, 'XX', 0, '' }, { 'ZADD', T, 'XX', 0, '' }, { 'ZREM', Z, '' }, { 'ZREM', T, '' },
  { 'PUBLISH', channel .. 'd:', '' },
}
for _, probe in ipairs(probes) do
  local answer = redis.pcall(unpack(probe))
  if type(answer) == 'table' and answer.err then return answer end
end
-- The last one, because it changes something.
bump()
revision = math.max(revision, math.min(tonumber(ARGV[3]), 9000000000000000) + 1)
store()
-- Only now: what ends a lease must not be stopped half-way either.
reap()
tell()
return call('PUBLISH', channel .. 'c:' .. ARGV[1], 'h' .. ARGV[2])
