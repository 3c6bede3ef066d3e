-- ARGV: line, name, depth. Answers nothing if the ticket is gone, or its token and the names ahead.
local function main()
  local token = call('HGET', H, 'T:' .. ARGV[1] .. '\n' .. ARGV[2])
  if not token then return {} end
  return { tonumber(token), ahead(ARGV[1], token, ARGV[2], ARGV[3]) }
end
